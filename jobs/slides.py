"""An image's file on this machine's disk, and its pixels by windows, for models that see large images tile by tile.

    with Copy(storage, entry, limits) as copy:          # hashed on the way
        windows = copy.windows(View())
        windows.size                                    # (height, width)
        windows.read(slice(0, 512), slice(512, 1024))   # [h, w, 1 to 3] of the type that they are kept in

Small images are held as they always were; what is over limits.image_bytes or limits.image_pixels is a TIFF that is
never held, up to limits.slide_bytes on disk and limits.slide_pixels.
"""

from __future__ import annotations

from functools import cached_property
from types import TracebackType

from cluster import watch
from cluster.errors import TooLarge
from cluster.scratch import Scratch
from cluster.settings import Limits
from cluster.storage import Storage
from jobs import images
from jobs.images import TAR, Entry
from jobs.views import View
from serve_app import contract
from serve_app.model import planes, preprocess, slides
from serve_app.model.planes import Stack
from serve_app.model.slides import Crop, Held, Slide, Windows


class Copy:
    """An image's file, copied from storage. Close it, and what was opened of it, when done: its bytes are on a disk.

    sha256: of its bytes, hex. large: whether it is more than is held in memory.

    Raises:
        TooLarge: over limits.slide_bytes. NotFound, Forbidden, Unavailable: the storage's; the last where the disk is
        full, too.
    """

    def __init__(self, storage: Storage, entry: Entry, limits: Limits) -> None:
        self.limits, self.scratch = limits, Scratch()
        self.path = self.scratch.path / "image"
        try:
            self.sha256 = self._fetch(storage, entry)
        except BaseException:
            self.close()
            raise

    def _fetch(self, storage: Storage, entry: Entry) -> str:
        if entry.container and not entry.container.lower().endswith(TAR):
            data = images.content(storage, entry, self.limits.image_bytes)
            self.path.write_bytes(data)
            return contract.image_id(data)
        uri = entry.container or images.file_uri(entry)
        size = entry.size if entry.container else storage.size(uri)
        if size > self.limits.slide_bytes:
            raise TooLarge(f"{entry.uri} is larger than the limit of {self.limits.slide_bytes} bytes")
        return storage.fetch(uri, self.path, slice(entry.at, entry.at + size) if entry.container else None)

    def image_id(self, part: str = "") -> str:
        """Of it, or a part of it: as `contract.image_id` of its bytes."""
        return contract.part_id(self.sha256, part)

    @cached_property
    def large(self) -> bool:
        if self.path.stat().st_size > self.limits.image_bytes:
            return True
        height, width = slides.tiff_size(self.path)
        return height * width > self.limits.image_pixels

    @cached_property
    def depths(self) -> tuple[int, int]:
        """(z, t) planes. Raises as `windows`."""
        with watch.ending():
            if self.large:
                return Stack(slides.mapped(self.path), self.limits.slide_pixels).depths
            return Stack(self.path.read_bytes(), self.limits.image_pixels).depths

    def windows(self, plane: View) -> Windows:
        """Of a plane, with its channels and its crop; for several threads at a time.

        Raises:
            InvalidImage, TooLarge, UnsupportedImage: as `preprocess.samples`, and as `Slide` where it is large.
        """
        z, t = (int(place) if place else None for place in (plane.z, plane.t))
        chosen = planes.channels(plane.channels) if plane.channels else ()
        with watch.ending():
            if self.large:
                found: Windows = Slide(self.path, self.limits.slide_pixels, z, t, chosen)
            elif chosen or plane.z or plane.t:
                stack = Stack(self.path.read_bytes(), self.limits.image_pixels)
                found = Held(stack.samples(z or 0, t or 0, chosen))
            else:
                found = Held(preprocess.samples(self.path.read_bytes(), self.limits.image_pixels))
        if not plane.crop:
            return found
        x, y, width, height = plane.numbers("crop")
        return Crop(found, (x, y, width, height))

    def close(self) -> None:
        self.scratch.close()

    def __enter__(self) -> Copy:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
