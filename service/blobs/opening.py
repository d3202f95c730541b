"""The store of files that the settings name: opened by every process, made by `rankpress migrate` alone.

A folder that machines share is known by a marker in it. Without one, a machine that has not mounted the folder would
begin a store of its own on its local disk, and its files would be missing everywhere else.
"""

from service.blobs.store import BlobStore
from service.settings import Settings


def open_blobs(settings: Settings) -> BlobStore:
    """The store as the API and the workers open it; a configured folder must be there (BlobStoreAwayError).

    The store in the data directory, which is what there is where nothing is configured, is made at its first use.
    """
    return _open(settings, create=not settings.blob_url)


def make_store(settings: Settings) -> bool:
    """Make the configured folder and its marker where they are missing; returns whether anything was made.

    An object store needs neither: its bucket is made by its owner, and one that is away answers to nobody.
    """
    return settings.blob_url.startswith("file:") and _open(settings, create=True).write_marker()


def _open(settings: Settings, *, create: bool) -> BlobStore:
    url = settings.resolved_blob_url
    in_files = url.startswith("file:")  # those are staged beside where they end
    return BlobStore(url, staging_dir=None if in_files else settings.data_dir / "staging", create=create)
