"""Every name and byte of the on-disk format: the documents of root, group, part and array, the names of parts, the bytes of chunks.

A document becomes a frozen record by ``parse_…``, which raises where it is damaged, and a record becomes a document by ``to_document`` or
``…_document``. Pure functions and records: never reads or writes a file. Other rooms import from this face.
"""

from lmprobe_zarr.store.format.array import ArrayInfo, array_dims, is_variable, parse_array
from lmprobe_zarr.store.format.blosc_frame import check_frame, decode_range
from lmprobe_zarr.store.format.call_order import CALL_ORDER, CallPlaces, call_of, parse_places
from lmprobe_zarr.store.format.chunk import TEXT_BYTES, encode_chunk, file_entry, holds_checksum, is_intact
from lmprobe_zarr.store.format.fields import ABSENT_FIELDS, PROCESS_FIELDS, describe_field, describe_unrecorded, unrecorded_fields
from lmprobe_zarr.store.format.files_table import FilesTable, bytes_by_folder, bytes_of_files, check_table
from lmprobe_zarr.store.format.group import GroupInfo, Provenance, check_new_provenance, parse_group
from lmprobe_zarr.store.format.names import (
    ANNOTATIONS,
    COLUMN,
    FORMAT,
    FORMAT_COLUMNS,
    GROUP_NAME,
    LEVELS,
    MADE_BY_WRITER,
    PROMPT_COLUMNS,
    SAMPLE_DIM,
    STAMPS,
    TOKEN_COLUMNS,
    Level,
    validate_column_names,
)
from lmprobe_zarr.store.format.part import (
    PartInfo,
    level_document,
    parse_part,
    parse_part_group,
    parse_removed,
    part_document,
    removed_document,
)
from lmprobe_zarr.store.format.part_names import PART_NAME, new_part_name, part_milliseconds, replacement_name
from lmprobe_zarr.store.format.published import PUBLISHED_MARK, published_document
from lmprobe_zarr.store.format.root import Published, is_root_document, parse_root, root_document

__all__ = [
    "ABSENT_FIELDS",
    "ANNOTATIONS",
    "CALL_ORDER",
    "COLUMN",
    "FORMAT",
    "FORMAT_COLUMNS",
    "GROUP_NAME",
    "LEVELS",
    "MADE_BY_WRITER",
    "PART_NAME",
    "PROCESS_FIELDS",
    "PROMPT_COLUMNS",
    "PUBLISHED_MARK",
    "SAMPLE_DIM",
    "STAMPS",
    "TEXT_BYTES",
    "TOKEN_COLUMNS",
    "ArrayInfo",
    "CallPlaces",
    "FilesTable",
    "GroupInfo",
    "Level",
    "PartInfo",
    "Provenance",
    "Published",
    "array_dims",
    "bytes_by_folder",
    "bytes_of_files",
    "call_of",
    "check_frame",
    "check_new_provenance",
    "check_table",
    "decode_range",
    "describe_field",
    "describe_unrecorded",
    "encode_chunk",
    "file_entry",
    "holds_checksum",
    "is_intact",
    "is_root_document",
    "is_variable",
    "level_document",
    "new_part_name",
    "parse_array",
    "parse_group",
    "parse_part",
    "parse_part_group",
    "parse_places",
    "parse_removed",
    "parse_root",
    "part_document",
    "part_milliseconds",
    "published_document",
    "removed_document",
    "replacement_name",
    "root_document",
    "unrecorded_fields",
    "validate_column_names",
]
