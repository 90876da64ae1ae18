"""The environment that libtpu needs before it loads on a machine without a TPU; it then compiles for any generation."""

import os

from vocojax.costs.topologies import DEVICELESS

for name, value in DEVICELESS.items():
    os.environ.setdefault(name, value)
