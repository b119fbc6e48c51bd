"""The daemon, killed at a step of an item's life: `edge-agent run`, with what it takes to end there.

`POWERLOSS_STEP` names the step (`hil.powerloss.main.STEPS`, and `publishing`), `POWERLOSS_COUNT` says at which time.
"""

from __future__ import annotations

import os
import sys
from functools import partial

import agent.app
from agent.cli import main
from agent.durable.desk import Desk
from hil.powerloss.child import Killer

if __name__ == "__main__":
    killer = Killer(os.environ["POWERLOSS_STEP"], int(os.environ["POWERLOSS_COUNT"]))
    vars(agent.app)["Desk"] = partial(Desk, step=killer)
    sys.exit(main())
