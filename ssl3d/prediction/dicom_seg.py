"""Masks of DICOM series as DICOM SEG, by highdicom: a segment for each class, on the series' own slices."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssl3d.data.scans.dicom import dicom_tags, frame_count, in_order, slices_of

Array = NDArray[Any]


def write_dicom_seg(
    files: Sequence[Path], labels: Array, classes: Sequence[dict[str, Any]], path: Path
) -> bool:
    """Write the mask of a DICOM series as a segmentation object that refers to its slices.

    Args:
        files: Slices of the series, a file each, in any order.
        labels: Mask values (I, J, K) on the grid of the series.
        classes: Value and name of each class, background first.
        path: File to write.

    Returns:
        Whether the file was written; not where slices are frames of one file, copies or several at a place.
    """
    tags = {file: dicom_tags(file) for file in files}
    if len(files) != labels.shape[2] or any(frame_count(tag) > 1 for tag in tags.values()):
        return False
    order, place = in_order(slices_of(tags))
    if place[-1] + 1 != len(files):
        return False
    import highdicom
    import pydicom
    from pydicom.sr.codedict import codes
    from pydicom.uid import ExplicitVRLittleEndian

    paths = list(tags)
    sources = [pydicom.dcmread(paths[n], stop_before_pixels=True) for n in order]
    kinds = classes[1:]
    index = np.zeros(labels.shape[::-1], np.uint8 if len(kinds) < 256 else np.uint16)
    for number, kind in enumerate(kinds, start=1):
        index[kind["value"] == labels.T] = number  # (K, rows, columns)
    release = version("ssl3d")
    algorithm = highdicom.AlgorithmIdentificationSequence(
        name="ssl3d", version=release, family=codes.DCM.ArtificialIntelligence
    )
    described = [
        highdicom.seg.SegmentDescription(
            segment_number=number,
            segment_label=str(kind["name"])[:64],
            segmented_property_category=codes.SCT.AnatomicalStructure,
            segmented_property_type=codes.SCT.AnatomicalStructure,
            algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=algorithm,
        )
        for number, kind in enumerate(kinds, start=1)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of source headers that highdicom would have otherwise
        segmentation = highdicom.seg.Segmentation(
            source_images=sources,
            pixel_array=index,
            segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
            segment_descriptions=described,
            series_instance_uid=highdicom.UID(),
            series_number=1000,
            sop_instance_uid=highdicom.UID(),
            instance_number=1,
            manufacturer="ssl3d",
            manufacturer_model_name="ssl3d predict",
            software_versions=release,
            device_serial_number="0",
            omit_empty_frames=bool(index.any()),
            transfer_syntax_uid=ExplicitVRLittleEndian,
            series_description="ssl3d predict",
        )
        segmentation.save_as(path)
    return True
