"""Where kernels are tested: on the GPU, where there is none by Triton's interpreter (see conftest.py)."""

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
