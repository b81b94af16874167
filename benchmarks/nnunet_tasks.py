"""What `benchmarks.nnunet` measures; each task in a process of its own, all with the interpreter that has nnU-Net.

Both go from the same NIfTI file to labels in a file, after the same job on one patch.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

import oocpatch
from benchmarks.contest import remove
from benchmarks.measure import answer, bytes_of, measured

RESAMPLING = "resample_data_or_seg_to_shape"


def make(folder: str, side: int, patch: int, classes: int, width: int) -> dict[str, Any]:
    """A scan of noise, one of a patch, and a folder of results: a U-Net of four stages with random weights."""
    import nibabel  # noqa: PLC0415 - not in the suite's environment
    from dynamic_network_architectures.architectures.unet import PlainConvUNet  # noqa: PLC0415

    root = Path(folder)
    for name, edge in (("scan", side), ("patch", patch)):
        values = np.random.default_rng(edge).normal(100, 200, (edge,) * 3).astype(np.float32)
        nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), root / f"{name}.nii")
    stages = 4
    arguments: dict[str, Any] = {
        "n_stages": stages, "features_per_stage": [width << stage for stage in range(stages)],
        "conv_op": "torch.nn.Conv3d", "kernel_sizes": [[3] * 3] * stages,
        "strides": [[1] * 3] + [[2] * 3] * (stages - 1), "n_conv_per_stage": [2] * stages,
        "n_conv_per_stage_decoder": [2] * (stages - 1), "conv_bias": True, "norm_op": "torch.nn.InstanceNorm3d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True}, "dropout_op": None, "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU", "nonlin_kwargs": {"inplace": True},
    }  # fmt: skip
    kwargs = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
    configuration = {
        "preprocessor_name": "DefaultPreprocessor", "patch_size": [patch] * 3, "spacing": [1.0] * 3,
        "normalization_schemes": ["CTNormalization"], "use_mask_for_norm": [False],
        "resampling_fn_data": RESAMPLING, "resampling_fn_data_kwargs": kwargs,
        "resampling_fn_seg": RESAMPLING, "resampling_fn_seg_kwargs": {**kwargs, "is_seg": True, "order": 1},
        "resampling_fn_probabilities": RESAMPLING, "resampling_fn_probabilities_kwargs": {**kwargs, "order": 1},
        "architecture": {
            "network_class_name": f"{PlainConvUNet.__module__}.{PlainConvUNet.__name__}", "arch_kwargs": arguments,
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
    }  # fmt: skip
    numbers = {"mean": 100.0, "std": 200.0, "percentile_00_5": -400.0, "percentile_99_5": 600.0}
    plans = {
        "image_reader_writer": "NibabelIO", "transpose_forward": [0, 1, 2], "transpose_backward": [0, 1, 2],
        "configurations": {"3d_fullres": configuration},
        "foreground_intensity_properties_per_channel": {"0": numbers},
    }  # fmt: skip
    labels = {"background": 0} | {f"label{label}": label for label in range(1, classes)}
    results = root / "results"
    (results / "fold_0").mkdir(parents=True, exist_ok=True)
    (results / "plans.json").write_text(json.dumps(plans))
    (results / "dataset.json").write_text(
        json.dumps({"channel_names": {"0": "CT"}, "labels": labels, "file_ending": ".nii"})
    )
    torch.manual_seed(0)
    kinds = {name: getattr(torch.nn, str(arguments[name]).removeprefix("torch.nn.")) for name in ("conv_op", "norm_op")}
    made = {**arguments, **kinds, "nonlin": torch.nn.LeakyReLU}
    network = PlainConvUNet(input_channels=1, num_classes=classes, deep_supervision=False, **made)
    checkpoint = {
        "network_weights": network.state_dict(), "init_args": {"configuration": "3d_fullres"},
        "trainer_name": "nnUNetTrainer", "inference_allowed_mirroring_axes": (0, 1, 2),
    }  # fmt: skip
    torch.save(checkpoint, results / "fold_0" / "checkpoint_final.pth")
    return {"parameters": sum(weights.numel() for weights in network.parameters())}


def theirs(folder: str, *, mirroring: bool, threads: int, limit: str | None) -> dict[str, Any]:
    """nnU-Net's predictor, which gets the scan in memory, as its documentation says; labels go to a file."""
    from nnunetv2.imageio.nibabel_reader_writer import NibabelIO  # noqa: PLC0415 - not in the suite's environment
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor  # noqa: PLC0415

    torch.set_num_threads(threads)
    root = Path(folder)

    def predict(name: str) -> None:
        predictor = nnUNetPredictor(use_mirroring=mirroring, device=torch.device("cpu"), allow_tqdm=False)
        predictor.initialize_from_trained_model_folder(str(root / "results"), (0,))
        image, properties = NibabelIO().read_images([str(root / f"{name}.nii")])
        labels = predictor.predict_single_npy_array(image, properties)
        np.save(root / "theirs.npy", labels.astype(np.uint8))

    predict("patch")
    with measured() as usage:
        _keep(limit)
        predict("scan")
    return vars(usage)


def ours(folder: str, *, mirroring: bool, threads: int, limit: str | None, max_memory: str) -> dict[str, Any]:
    """The same by oocpatch, and the share of labels that differ from nnU-Net's, which came first."""
    torch.set_num_threads(threads)
    root = Path(folder)
    options: dict[str, Any] = {"max_memory": max_memory, "progress": False}
    options |= {} if mirroring else {"augment": "none"}

    def plan(name: str) -> Any:
        remove(root / "ours.zarr")
        return oocpatch.plan(str(root / f"{name}.nii"), f"nnunet:{root / 'results'}", root / "ours.zarr", **options)

    plan("patch").run()
    with measured() as usage:
        _keep(limit)
        began = plan("scan")
        result = began.run()
    record = {**vars(usage), "projected": began.projected_memory, "patches": began.patches}
    labels = np.load(root / "theirs.npy")
    if labels.shape == tuple(result.sizes[name] for name in "zyx"):
        record["differ"] = float(np.mean(result.squeeze(drop=True).transpose("z", "y", "x").values != labels))
    return record


def _keep(limit: str | None) -> None:
    """End this process by SIGKILL, as the kernel ends one in a container, once it has `limit` more than now."""
    if limit is None:
        return
    process = psutil.Process()
    most = process.memory_info().rss + bytes_of(limit)

    def watch() -> None:
        while process.memory_info().rss <= most:
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    answer(make, theirs, ours)
