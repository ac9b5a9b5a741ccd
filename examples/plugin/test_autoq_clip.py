"""autoq's conformance suite on every variant of the scheme; the package has to be installed."""

from autoq_clip import Int4Clip

from autoq.testing import Conformance, NearestCodes


class TestInt4Clip(Conformance, NearestCodes):
    """What every scheme must do, and that each code is the nearest of its grid."""

    candidates = Int4Clip.variants()
