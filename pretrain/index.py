"""DCP's index of a checkpoint's tensors, which is a pickle, read by an unpickler that knows what an index is made of.

tensors/.metadata ─> Reader ─> shapes, types and places of the tensors, or pickle.UnpicklingError; nothing else is ever run
"""

import os
import pickle
from pathlib import Path
from typing import Any, ClassVar

import torch.distributed.checkpoint as dcp


class Reader(dcp.FileSystemReader):
    """DCP's reader, but its index, which is a pickle, may name only what an index is made of."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
        """Raises pickle.UnpicklingError for an index that names anything else, or leads elsewhere than to its own tensors."""
        with open(Path(self.path) / ".metadata", "rb") as file:
            metadata = _IndexUnpickler(file).load()
        for entry in metadata.state_dict_metadata.values():
            if type(entry) is not dcp.metadata.TensorStorageMetadata:  # DCP would unpickle its content, whatever it is
                raise pickle.UnpicklingError(f"a checkpoint's index has a {type(entry).__name__} among its tensors")
        for place in metadata.storage_data.values():
            if place.relative_path != os.path.basename(place.relative_path) or place.transform_descriptors:
                raise pickle.UnpicklingError(
                    f"a checkpoint's index leads to {place.relative_path}, not into its folder"
                )
        metadata.storage_meta = metadata.storage_meta or dcp.metadata.StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _IndexUnpickler(pickle.Unpickler):
    ALLOWED: ClassVar[dict[str, set[str]]] = {
        "torch.distributed.checkpoint.metadata": {
            "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        },
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
        "torch.serialization": {"_get_layout"},
        "torch": {"Size", "float32", "float64", "bfloat16", "float16", "int64"},
        "pathlib": {"PosixPath"},
        "pathlib._local": {"PosixPath"},  # where Python 3.13 keeps it
    }  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        if name not in self.ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"a checkpoint's index names {module}.{name}, which has no place there")
        return super().find_class(module, name)
