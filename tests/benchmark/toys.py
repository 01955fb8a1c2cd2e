"""A model for other processes to find by its path."""

import os
import signal
from pathlib import Path

from anomalib.models import Dfm


class Hungry(Dfm):
    """DFM whose process is killed, as the system does where memory is short, until a file exists."""

    def __init__(self, marker, backbone, layer, **settings):
        super().__init__(backbone=backbone, layer=layer, **settings)
        self.marker = Path(marker)

    def setup(self, stage):
        super().setup(stage)
        if not self.marker.exists():
            self.marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
