"""Nothing of what the commands do on the images that ship goes to the network."""

import pytest
from tiny_checkout import make_checkout

# The commands, in a process without a network: whoever asks for an address or a connection fails, and is noted.
OFFLINE = """
import os
import socket
import sys
import urllib.request

from effbackbones.cli import main

folder = sys.argv[1]
os.chdir(folder)
asked = []


def refuse(event, arguments):
    if event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.connect", "socket.sendto"):
        local = event == "socket.connect" and arguments[0].family == socket.AF_UNIX  # of loader processes
        if not local:
            asked.append(event)
            raise OSError("there is no network")


sys.addaudithook(refuse)
try:
    urllib.request.urlopen("http://127.0.0.1:9")
except OSError:
    pass
assert asked, "the test does not see what it is to see"
asked.clear()
image = "data/samples/coat.png"
for command in (
    ["ls"],
    ["show", "quickstart"],
    ["train", "quickstart", "data.workers=1"],
    ["eval", "runs/quickstart"],
    ["predict", image, "--run", "runs/quickstart"],
    ["doctor"],
):
    code = main(command)
    assert code == 0 or command == ["doctor"], (command, code)
    assert not asked, (command, asked)
print("done")
"""


@pytest.mark.filterwarnings("ignore::UserWarning:lightning")
def test_no_command_asks_for_the_network(forks, tmp_path):
    process = forks.start(str(make_checkout(tmp_path)), code=OFFLINE)
    assert process.wait() == 0, process.said
    assert process.said.endswith("done\n")
