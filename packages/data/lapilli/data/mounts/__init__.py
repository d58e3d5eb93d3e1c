"""From an image key of an annotation file to the image's bytes.

A key is data from strangers: it never leads outside its root, symlinks included. `locate` finds
where a key's bytes are, in a folder, a zip or a tar, local or remote; `reading` reads them there.
"""

from lapilli.data.mounts.locate import Mount
from lapilli.data.mounts.places import EXTENSIONS, Located
from lapilli.data.mounts.reading import read_image

__all__ = ["EXTENSIONS", "Located", "Mount", "read_image"]
