import os

__version__ = "0.1.0"

# PyTorch reads this when a process first uses a GPU: segments that can grow leave fewer gaps,
# so a GPU whose memory is nearly full does not run out of it
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
