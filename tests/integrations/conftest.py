"""timm imports torchvision, and pytest imports the tests that use it after this."""

from __future__ import annotations

import torchvision_on_cpu

torchvision_on_cpu.allow()
