"""The public interface: all that plugins import. Names are loaded when first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ssl3d import statistics as statistics
    from ssl3d.aggregator import AggregatedEncoder as AggregatedEncoder
    from ssl3d.aggregator import AggregatorConfig as AggregatorConfig
    from ssl3d.aggregator import Attended as Attended
    from ssl3d.aggregator import SliceAggregator as SliceAggregator
    from ssl3d.aggregator import attended_offset as attended_offset
    from ssl3d.benchmark import Benchmark as Benchmark
    from ssl3d.benchmark import Contestant as Contestant
    from ssl3d.benchmark import Result as Result
    from ssl3d.benchmark import Scores as Scores
    from ssl3d.benchmark import find_result as find_result
    from ssl3d.benchmark import read_result as read_result
    from ssl3d.benchmark import split_digest as split_digest
    from ssl3d.benchmark import write_result as write_result
    from ssl3d.checkpoint import encoder_from as encoder_from
    from ssl3d.checkpoint import fitting as fitting
    from ssl3d.checkpoint import identity_hash as identity_hash
    from ssl3d.checkpoint import load_encoder as load_encoder
    from ssl3d.checkpoint import load_proxies as load_proxies
    from ssl3d.checkpoint import open_data_for as open_data_for
    from ssl3d.clustering import MemoryBank as MemoryBank
    from ssl3d.clustering import Prototypes as Prototypes
    from ssl3d.clustering import agreement as agreement
    from ssl3d.clustering import default_prototypes as default_prototypes
    from ssl3d.clustering import mutual_information as mutual_information
    from ssl3d.clustering import perplexity as perplexity
    from ssl3d.clustering import prototype_picture as prototype_picture
    from ssl3d.clustering import shard as shard
    from ssl3d.clustering import sinkhorn as sinkhorn
    from ssl3d.clustering import spherical_kmeans as spherical_kmeans
    from ssl3d.clustering import swav_loss as swav_loss
    from ssl3d.config import Plugins as Plugins
    from ssl3d.config import parse as parse
    from ssl3d.config import print_table as print_table
    from ssl3d.convert import to_3d as to_3d
    from ssl3d.convert.encoder import ConvertedConfig as ConvertedConfig
    from ssl3d.convert.encoder import ConvertedEncoder as ConvertedEncoder
    from ssl3d.convert.foreign import load_foreign as load_foreign
    from ssl3d.convert.networks import network_2d as network_2d
    from ssl3d.convert.nnunet import export_nnunet as export_nnunet
    from ssl3d.corruptions import Corruptions as Corruptions
    from ssl3d.corruptions import corrupt as corrupt
    from ssl3d.corruptions import restoration_error as restoration_error
    from ssl3d.data.boxes import around_mask as around_mask
    from ssl3d.data.geometry import save_nifti as save_nifti
    from ssl3d.data.geometry import to_patient as to_patient
    from ssl3d.data.loader import Batch as Batch
    from ssl3d.data.loader import Group as Group
    from ssl3d.data.loader import Loader as Loader
    from ssl3d.data.phantoms import cache_folder as cache_folder
    from ssl3d.data.phantoms import phantom as phantom
    from ssl3d.data.phantoms import phantom_store as phantom_store
    from ssl3d.data.phantoms import simulated_index as simulated_index
    from ssl3d.data.prepare import PrepareOptions as PrepareOptions
    from ssl3d.data.split import house_split as house_split
    from ssl3d.data.store import Collection as Collection
    from ssl3d.data.store import Record as Record
    from ssl3d.data.store import Volume as Volume
    from ssl3d.data.store import assemble as assemble
    from ssl3d.data.store import open_data as open_data
    from ssl3d.data.store import write_part as write_part
    from ssl3d.decoder import Decoder as Decoder
    from ssl3d.decoder import conv3x3x3 as conv3x3x3
    from ssl3d.detection.anchors3d import AnchorPlan as AnchorPlan
    from ssl3d.detection.anchors3d import fit_shapes as fit_shapes
    from ssl3d.detection.anchors3d import plan_anchors as plan_anchors
    from ssl3d.detection.boxes3d import nms as nms
    from ssl3d.detection.boxes3d import weighted_clusters as weighted_clusters
    from ssl3d.detection.crops2d import Boxed as Boxed
    from ssl3d.detection.crops3d import BoxViews3d as BoxViews3d
    from ssl3d.detection.crops3d import draw_boxed3d as draw_boxed3d
    from ssl3d.detection.crops3d import move_boxed3d as move_boxed3d
    from ssl3d.detection.metrics import Detections as Detections
    from ssl3d.detection.metrics import DetectionScores as DetectionScores
    from ssl3d.detection.metrics import Truths as Truths
    from ssl3d.detection.metrics import average_precision as average_precision
    from ssl3d.detection.metrics import box_iou as box_iou
    from ssl3d.detection.metrics import froc as froc
    from ssl3d.detection.proxy2d import Detection2dOptions as Detection2dOptions
    from ssl3d.detection.proxy2d import DetectionPass as DetectionPass
    from ssl3d.detection.proxy2d import DetectionProxy2d as DetectionProxy2d
    from ssl3d.detection.proxy2d import score_boxes as score_boxes
    from ssl3d.detection.retinanet3d import RetinaNet3d as RetinaNet3d
    from ssl3d.detection.retinanet3d import RetinaNet3dConfig as RetinaNet3dConfig
    from ssl3d.detection.roi_align3d import roi_align3d as roi_align3d
    from ssl3d.detection.two_stage2d import DetectionTargets as DetectionTargets
    from ssl3d.detection.two_stage2d import TwoStageConfig as TwoStageConfig
    from ssl3d.detection.two_stage2d import TwoStageDetector2d as TwoStageDetector2d
    from ssl3d.detection.two_stage3d import TwoStage3dConfig as TwoStage3dConfig
    from ssl3d.detection.two_stage3d import TwoStageDetector3d as TwoStageDetector3d
    from ssl3d.device import peak_memory as peak_memory
    from ssl3d.distributed import gather as gather
    from ssl3d.distributed import rank as rank
    from ssl3d.distributed import row_counts as row_counts
    from ssl3d.distributed import world_size as world_size
    from ssl3d.embedding import pooled_by as pooled_by
    from ssl3d.encoder import Encoder as Encoder
    from ssl3d.encoders import memory_format as memory_format
    from ssl3d.encoders import to_memory_format as to_memory_format
    from ssl3d.encoders.masking import can_mask as can_mask
    from ssl3d.encoders.masking import only_visible as only_visible
    from ssl3d.encoders.masking import visible_at as visible_at
    from ssl3d.encoders.norms import norm as norm
    from ssl3d.errors import CheckpointError as CheckpointError
    from ssl3d.errors import DataError as DataError
    from ssl3d.errors import Ssl3dError as Ssl3dError
    from ssl3d.errors import TrainingError as TrainingError
    from ssl3d.errors import UsageError as UsageError
    from ssl3d.heads import projection_head as projection_head
    from ssl3d.inference import dense_features as dense_features
    from ssl3d.inference import embed_slices as embed_slices
    from ssl3d.inference import embed_volume as embed_volume
    from ssl3d.inference import recalibrate_norm as recalibrate_norm
    from ssl3d.inference import upsample as upsample
    from ssl3d.inference import window_starts as window_starts
    from ssl3d.leaks import hashes_complete as hashes_complete
    from ssl3d.leaks import hashes_in as hashes_in
    from ssl3d.leaks import leak_flags as leak_flags
    from ssl3d.losses import alignment as alignment
    from ssl3d.losses import barlow_twins_loss as barlow_twins_loss
    from ssl3d.losses import nt_xent as nt_xent
    from ssl3d.losses import uniformity as uniformity
    from ssl3d.modes import evaluating as evaluating
    from ssl3d.monitor import duration as duration
    from ssl3d.options import request_of as request_of
    from ssl3d.permutations import PermutationSet as PermutationSet
    from ssl3d.permutations import permutation_set as permutation_set
    from ssl3d.plugin_files import code_digest as code_digest
    from ssl3d.proxy import Proxy as Proxy
    from ssl3d.proxy import StepOutput as StepOutput
    from ssl3d.record_archive import pack_records as pack_records
    from ssl3d.record_archive import record_bytes as record_bytes
    from ssl3d.record_archive import record_files as record_files
    from ssl3d.record_archive import unpacked_place as unpacked_place
    from ssl3d.rng import BatchRng as BatchRng
    from ssl3d.rng import numpy_rng as numpy_rng
    from ssl3d.rng import one_group as one_group
    from ssl3d.rng import seed_of as seed_of
    from ssl3d.segmentation.heads import segmentation_head as segmentation_head
    from ssl3d.segmentation.loss import dice_ce_loss as dice_ce_loss
    from ssl3d.segmentation.metrics import mask_scores as mask_scores
    from ssl3d.segmentation.network import CoarseToFine as CoarseToFine
    from ssl3d.segmentation.network import SegmentationNetwork as SegmentationNetwork
    from ssl3d.segmentation.network import expanded as expanded
    from ssl3d.segmentation.network import find_region as find_region
    from ssl3d.segmentation.network import shrunk as shrunk
    from ssl3d.segmentation.network import shrunk_mask as shrunk_mask
    from ssl3d.segmentation.save import save_segmentation as save_segmentation
    from ssl3d.segmentation.windows import predict_windows as predict_windows
    from ssl3d.sorting import in_order as in_order
    from ssl3d.sorting import kendall_tau as kendall_tau
    from ssl3d.sorting import sorting_loss as sorting_loss
    from ssl3d.trainee import lone_values as lone_values
    from ssl3d.views.compose import ViewRng as ViewRng
    from ssl3d.views.compose import Views as Views
    from ssl3d.views.compose import augment as augment
    from ssl3d.views.compose import augment_labelled as augment_labelled
    from ssl3d.views.compose import view_margin as view_margin
    from ssl3d.views.crops import draw_crop as draw_crop
    from ssl3d.views.crops import draw_overlapping as draw_overlapping
    from ssl3d.views.crops import draw_positions as draw_positions
    from ssl3d.views.crops import fit_size as fit_size
    from ssl3d.views.crops import foreground_shares as foreground_shares
    from ssl3d.views.crops import lay_flat as lay_flat
    from ssl3d.views.crops import neighbour_position as neighbour_position
    from ssl3d.views.crops import read_crop as read_crop
    from ssl3d.views.crops import read_slab as read_slab
    from ssl3d.views.crops import slab_size as slab_size
    from ssl3d.views.labelled import dataset_labels as dataset_labels
    from ssl3d.views.labelled import draw_labelled as draw_labelled
    from ssl3d.views.labelled import mask_places as mask_places
    from ssl3d.views.labelled import mask_values as mask_values
    from ssl3d.views.labelled import read_labelled as read_labelled
    from ssl3d.views.outside import apply_torchio as apply_torchio
    from ssl3d.views.pairs import PairViews as PairViews
    from ssl3d.views.pairs import augment_pairs as augment_pairs
    from ssl3d.views.pairs import check_depth as check_depth
    from ssl3d.views.pairs import draw_pairs as draw_pairs
    from ssl3d.views.pairs import embed_pairs as embed_pairs
    from ssl3d.views.pairs import pair_picture as pair_picture
    from ssl3d.views.places import draw_places as draw_places
    from ssl3d.views.restore import RestoreViews as RestoreViews
    from ssl3d.views.restore import draw_one as draw_one
    from ssl3d.views.restore import mirror_one as mirror_one
    from ssl3d.views.restore import read_foreground as read_foreground
    from ssl3d.views.restore import restoration_picture as restoration_picture
    from ssl3d.views.spatial import centre_crop as centre_crop
    from ssl3d.words import find_alike as find_alike
    from ssl3d.words import word_places as word_places

_HOME = {
    "seed_of": "rng",
    "evaluating": "modes",
    "lone_values": "trainee",
    "TrainingError": "errors",
    "peak_memory": "device",
    "Plugins": "config",
    "AggregatedEncoder": "aggregator",
    "AggregatorConfig": "aggregator",
    "embed_slices": "inference",
    "pooled_by": "embedding",
    "agreement": "clustering",
    "Attended": "aggregator",
    "attended_offset": "aggregator",
    "default_prototypes": "clustering",
    "MemoryBank": "clustering",
    "mutual_information": "clustering",
    "perplexity": "clustering",
    "prototype_picture": "clustering",
    "Prototypes": "clustering",
    "shard": "clustering",
    "sinkhorn": "clustering",
    "SliceAggregator": "aggregator",
    "alignment": "losses",
    "apply_torchio": "views.outside",
    "assemble": "data.store",
    "augment": "views.compose",
    "augment_labelled": "views.compose",
    "dataset_labels": "views.labelled",
    "draw_labelled": "views.labelled",
    "mask_places": "views.labelled",
    "mask_values": "views.labelled",
    "norm": "encoders.norms",
    "read_labelled": "views.labelled",
    "augment_pairs": "views.pairs",
    "barlow_twins_loss": "losses",
    "Batch": "data.loader",
    "BatchRng": "rng",
    "Benchmark": "benchmark",
    "cache_folder": "data.phantoms",
    "can_mask": "encoders.masking",
    "centre_crop": "views.spatial",
    "check_depth": "views.pairs",
    "CheckpointError": "errors",
    "Collection": "data.store",
    "Contestant": "benchmark",
    "corrupt": "corruptions",
    "Corruptions": "corruptions",
    "ConvertedConfig": "convert.encoder",
    "ConvertedEncoder": "convert.encoder",
    "average_precision": "detection.metrics",
    "AnchorPlan": "detection.anchors3d",
    "fit_shapes": "detection.anchors3d",
    "plan_anchors": "detection.anchors3d",
    "nms": "detection.boxes3d",
    "weighted_clusters": "detection.boxes3d",
    "BoxViews3d": "detection.crops3d",
    "draw_boxed3d": "detection.crops3d",
    "move_boxed3d": "detection.crops3d",
    "RetinaNet3d": "detection.retinanet3d",
    "RetinaNet3dConfig": "detection.retinanet3d",
    "roi_align3d": "detection.roi_align3d",
    "TwoStage3dConfig": "detection.two_stage3d",
    "TwoStageDetector3d": "detection.two_stage3d",
    "around_mask": "data.boxes",
    "window_starts": "inference",
    "box_iou": "detection.metrics",
    "Detections": "detection.metrics",
    "DetectionScores": "detection.metrics",
    "froc": "detection.metrics",
    "Truths": "detection.metrics",
    "Boxed": "detection.crops2d",
    "Detection2dOptions": "detection.proxy2d",
    "DetectionPass": "detection.proxy2d",
    "DetectionProxy2d": "detection.proxy2d",
    "score_boxes": "detection.proxy2d",
    "DetectionTargets": "detection.two_stage2d",
    "TwoStageConfig": "detection.two_stage2d",
    "TwoStageDetector2d": "detection.two_stage2d",
    "DataError": "errors",
    "conv3x3x3": "decoder",
    "Decoder": "decoder",
    "dense_features": "inference",
    "draw_crop": "views.crops",
    "draw_one": "views.restore",
    "draw_overlapping": "views.crops",
    "draw_pairs": "views.pairs",
    "draw_places": "views.places",
    "draw_positions": "views.crops",
    "embed_pairs": "views.pairs",
    "embed_volume": "inference",
    "duration": "monitor",
    "Encoder": "encoder",
    "encoder_from": "checkpoint",
    "find_alike": "words",
    "find_result": "benchmark",
    "fit_size": "views.crops",
    "export_nnunet": "convert.nnunet",
    "fitting": "checkpoint",
    "foreground_shares": "views.crops",
    "gather": "distributed",
    "rank": "distributed",
    "row_counts": "distributed",
    "world_size": "distributed",
    "Group": "data.loader",
    "house_split": "data.split",
    "identity_hash": "checkpoint",
    "in_order": "sorting",
    "kendall_tau": "sorting",
    "lay_flat": "views.crops",
    "leak_flags": "leaks",
    "hashes_in": "leaks",
    "hashes_complete": "leaks",
    "load_encoder": "checkpoint",
    "load_foreign": "convert.foreign",
    "load_proxies": "checkpoint",
    "Loader": "data.loader",
    "memory_format": "encoders",
    "mirror_one": "views.restore",
    "neighbour_position": "views.crops",
    "network_2d": "convert.networks",
    "nt_xent": "losses",
    "numpy_rng": "rng",
    "one_group": "rng",
    "only_visible": "encoders.masking",
    "open_data": "data.store",
    "open_data_for": "checkpoint",
    "pair_picture": "views.pairs",
    "PairViews": "views.pairs",
    "parse": "config",
    "permutation_set": "permutations",
    "PermutationSet": "permutations",
    "phantom": "data.phantoms",
    "phantom_store": "data.phantoms",
    "print_table": "config",
    "projection_head": "heads",
    "Proxy": "proxy",
    "code_digest": "plugin_files",
    "read_crop": "views.crops",
    "request_of": "options",
    "PrepareOptions": "data.prepare",
    "read_foreground": "views.restore",
    "read_result": "benchmark",
    "read_slab": "views.crops",
    "recalibrate_norm": "inference",
    "Record": "data.store",
    "restoration_error": "corruptions",
    "restoration_picture": "views.restore",
    "RestoreViews": "views.restore",
    "Result": "benchmark",
    "save_nifti": "data.geometry",
    "Scores": "benchmark",
    "segmentation_head": "segmentation.heads",
    "dice_ce_loss": "segmentation.loss",
    "mask_scores": "segmentation.metrics",
    "CoarseToFine": "segmentation.network",
    "SegmentationNetwork": "segmentation.network",
    "expanded": "segmentation.network",
    "find_region": "segmentation.network",
    "shrunk": "segmentation.network",
    "shrunk_mask": "segmentation.network",
    "save_segmentation": "segmentation.save",
    "predict_windows": "segmentation.windows",
    "simulated_index": "data.phantoms",
    "slab_size": "views.crops",
    "sorting_loss": "sorting",
    "spherical_kmeans": "clustering",
    "split_digest": "benchmark",
    "Ssl3dError": "errors",
    "statistics": "statistics",
    "StepOutput": "proxy",
    "swav_loss": "clustering",
    "to_3d": "convert",
    "to_patient": "data.geometry",
    "to_memory_format": "encoders",
    "uniformity": "losses",
    "upsample": "inference",
    "UsageError": "errors",
    "visible_at": "encoders.masking",
    "view_margin": "views.compose",
    "ViewRng": "views.compose",
    "Views": "views.compose",
    "Volume": "data.store",
    "word_places": "words",
    "write_part": "data.store",
    "write_result": "benchmark",
    "pack_records": "record_archive",
    "record_bytes": "record_archive",
    "record_files": "record_archive",
    "unpacked_place": "record_archive",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"ssl3d.api has no {name!r}; it has {', '.join(sorted(_HOME))}")
    if name == "statistics":
        return importlib.import_module("ssl3d.statistics")
    return getattr(importlib.import_module(f"ssl3d.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(_HOME)
