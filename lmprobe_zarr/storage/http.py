"""`HttpStorage`, files below a web address: reads ranges and looks at the status, since not every web server sends them."""

from __future__ import annotations

from typing import Any, Final

from fsspec.asyn import sync

from lmprobe_zarr.errors import UnreachableError
from lmprobe_zarr.storage.client_errors import is_passing, response_code
from lmprobe_zarr.storage.ranges import Answer, Run, answered
from lmprobe_zarr.storage.remote import FsspecStorage

__all__ = ["HttpStorage"]

_NO_RANGES: Final = {400, 405, 406, 501}  # how servers answer that know no ranges and refuse requests for them


class HttpStorage(FsspecStorage):
    """Files below a web address.

    fsspec returns the body of an answer without its status, so that a whole file cannot be told from a range of it.
    """

    # Until a server has sent a range, and after it has not, one range is requested before the others: its answer may be the whole file.
    sends_ranges = False

    def _request(self, key: str, run: Run) -> Answer | None:
        try:
            answer: Answer | None = self.call(sync, self.filesystem.loop, self._get, self._path(key), run, key=key)
        except UnreachableError as error:
            # An answer that was cut short has such a number too.
            if is_passing(error.__cause__) or response_code(error)[1] not in _NO_RANGES:
                raise
            return None
        self.sends_ranges = answer is not None and not answer.is_whole
        return answer

    async def _get(self, path: str, run: Run) -> Answer | None:
        options: dict[str, Any] = dict(self.filesystem.kwargs)
        headers = {**(options.pop("headers", None) or {}), "Range": run.header, "Accept-Encoding": "identity"}
        session = await self.filesystem.set_session()
        async with session.get(self.filesystem.encode_url(path), headers=headers, **options) as response:
            response.raise_for_status()
            is_partial = response.status == 206
            if is_partial and response.headers.get("Content-Encoding", "identity") != "identity":
                return None  # a range of other bytes than those of the file
            return answered(run, await response.read(), is_partial=is_partial, content_range=response.headers.get("Content-Range"))
