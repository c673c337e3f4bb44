"""Architectures, one file each. Every module here is imported, which registers what it defines.

So is what installed packages offer (`outside`).
"""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

importlib.import_module(f"{__name__}.outside").import_offered()
