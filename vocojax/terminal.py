"""What launch scripts show on the terminal besides progress bars and tables."""

import logging

from absl import logging as absl_logging


def show_own_messages() -> None:
    """Messages of this package from INFO on; libraries' (Orbax reports every file it touches) from WARNING on."""
    absl_logging.set_verbosity(absl_logging.WARNING)
    logging.getLogger("vocojax").setLevel(logging.INFO)
