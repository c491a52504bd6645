"""What tests need that use the LIBERO package."""

import ctypes.util
import importlib.util

import pytest

_NO_PACKAGE = (
    "LIBERO is not installed (pip install 'jaxvla[libero]')"
    if importlib.util.find_spec("libero") is None
    else ""
)
_NO_GL = (
    "OSMesa is not installed (apt-get install libosmesa6)"
    if ctypes.util.find_library("OSMesa") is None
    else ""
)

needs_package = pytest.mark.skipif(bool(_NO_PACKAGE), reason=_NO_PACKAGE)
needs_libero = pytest.mark.skipif(bool(_NO_PACKAGE or _NO_GL), reason=_NO_PACKAGE or _NO_GL)
"""The package, and the software renderer that its import wants."""
