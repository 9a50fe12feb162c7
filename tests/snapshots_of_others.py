"""Small files in the formats of other projects, written by the tests themselves."""

import pickle
import sys
import types

import torch
from torch import nn

SOURCE = "raise SystemExit('the source in a snapshot was run')"


def _reconstruct_persistent_obj(meta):
    raise AssertionError("a persistent object was built")


_reconstruct_persistent_obj.__module__ = "torch_utils.persistence"


class Persistent:
    """Pickles as an object of EDM's persistent classes does: name, source code and attributes."""

    def __init__(self, class_name, state, source=SOURCE):
        self.meta = {"type": "class", "version": 6, "module_src": source,
                     "class_name": class_name, "state": state}  # fmt: skip

    def __reduce__(self):
        return _reconstruct_persistent_obj, (self.meta,), None


class EasyDict(dict):
    pass


EasyDict.__module__ = "dnnlib.util"


def install(monkeypatch):
    """Modules by whose names the pickles refer to what others' classes are in."""
    names = {
        "torch_utils": {},
        "dnnlib": {},
        "torch_utils.persistence": {"_reconstruct_persistent_obj": _reconstruct_persistent_obj},
        "dnnlib.util": {"EasyDict": EasyDict},
    }
    for name, values in names.items():
        module = types.ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)


def as_module(net, class_name, options=None, rename=None):
    """A module of ours as one of theirs: parameters, buffers and, in ModuleDicts, children."""
    children = {
        (rename or {}).get(name, name): None
        if child is None
        else as_module(child, type(child).__name__)
        for name, child in net._modules.items()
    }
    state = {
        "training": False,
        "_parameters": {
            name: None if p is None else nn.Parameter(p.detach())
            for name, p in net._parameters.items()
        },
        "_buffers": dict(net._buffers),
        "_non_persistent_buffers_set": set(net._non_persistent_buffers_set),
        "_modules": children,
    }  # fmt: skip
    if isinstance(net, nn.ModuleDict):
        made = nn.ModuleDict()
        made.__dict__["_modules"] = children
        return made
    if options is not None:
        state |= {"_init_args": (), "_init_kwargs": options, "sigma_data": 0.5}
    return Persistent(class_name, state)


def snapshot(net, class_name="EDMPrecond", *, loss="EDMLoss", loss_state=None, options=None,
             rename=None, protocol=4, key="ema"):  # fmt: skip
    """The bytes of a network-snapshot-*.pkl."""
    data = EasyDict({
        key: as_module(net, class_name, options or {"img_resolution": net.img_resolution}, rename),
        "loss_fn": Persistent(loss, {"P_mean": -1.2, **(loss_state or {})}) if loss else None,
        "augment_pipe": None,
        "dataset_kwargs": {"path": "images.zip", "use_labels": False, "size": torch.Size([3, 8])},
    })  # fmt: skip
    return pickle.dumps(data, protocol=protocol)
