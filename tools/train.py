"""Train from a clone or under torchrun: `torchrun --nproc-per-node 8 tools/train.py in1k/uniformer_small`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the clone needs no installation

from effbackbones.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
