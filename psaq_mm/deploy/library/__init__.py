"""What the libraries compute from feature maps to answers, written so that a trace of it holds for every image.

The libraries decide in Python: whether any box is left, how many there are, how large the image is. A trace freezes
what they decided for its example. The functions here compute the same and leave such questions to operators. Each says
what it takes the place of; whatever calls that, in any library or in a user's own code, gets ours within
:func:`traceable_library`.
"""
from .refused import refuse
from .replace import Traced, number, replaces, traceable_library

__all__ = ['Traced', 'number', 'refuse', 'replaces', 'traceable_library']
