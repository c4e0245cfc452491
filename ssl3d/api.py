"""The public interface: all that plugins import. Names are loaded when first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ssl3d import plugins as plugins
    from ssl3d.benchmark import Benchmark as Benchmark
    from ssl3d.benchmark import Contestant as Contestant
    from ssl3d.benchmark import Scores as Scores
    from ssl3d.checkpoint.encoders import load_encoder as load_encoder
    from ssl3d.checkpoint.proxies import load_proxies as load_proxies
    from ssl3d.checkpoint.volumes_seen import hashes_complete as hashes_complete
    from ssl3d.checkpoint.volumes_seen import hashes_in as hashes_in
    from ssl3d.config import Plugins as Plugins
    from ssl3d.config import parse as parse
    from ssl3d.config import print_table as print_table
    from ssl3d.convert import to_3d as to_3d
    from ssl3d.convert.encoder import ConvertedConfig as ConvertedConfig
    from ssl3d.convert.encoder import ConvertedEncoder as ConvertedEncoder
    from ssl3d.convert.foreign import load_foreign as load_foreign
    from ssl3d.convert.networks import network_2d as network_2d
    from ssl3d.convert.nnunet import export_nnunet as export_nnunet
    from ssl3d.data.cache import cache_folder as cache_folder
    from ssl3d.data.geometry import save_nifti as save_nifti
    from ssl3d.data.geometry import to_patient as to_patient
    from ssl3d.data.identity import identity_hash as identity_hash
    from ssl3d.data.open import open_data as open_data
    from ssl3d.data.open import open_data_for as open_data_for
    from ssl3d.data.phantoms import phantom as phantom
    from ssl3d.data.phantoms import phantom_store as phantom_store
    from ssl3d.data.phantoms import simulated_index as simulated_index
    from ssl3d.data.preparation.prepare import PrepareOptions as PrepareOptions
    from ssl3d.data.scans.boxes import around_mask as around_mask
    from ssl3d.data.split import house_split as house_split
    from ssl3d.data.store.collection import Collection as Collection
    from ssl3d.data.store.record import Record as Record
    from ssl3d.data.store.volume import Volume as Volume
    from ssl3d.data.store.writer import assemble as assemble
    from ssl3d.data.store.writer import write_part as write_part
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
    from ssl3d.distributed import gather as gather
    from ssl3d.distributed import rank as rank
    from ssl3d.distributed import row_counts as row_counts
    from ssl3d.distributed import world_size as world_size
    from ssl3d.encoder import Encoder as Encoder
    from ssl3d.encoders import memory_format as memory_format
    from ssl3d.encoders import to_memory_format as to_memory_format
    from ssl3d.encoders.inference import dense_features as dense_features
    from ssl3d.encoders.inference import embed_slices as embed_slices
    from ssl3d.encoders.inference import embed_volume as embed_volume
    from ssl3d.encoders.inference import evaluating as evaluating
    from ssl3d.encoders.inference import recalibrate_norm as recalibrate_norm
    from ssl3d.encoders.inference import upsample as upsample
    from ssl3d.encoders.inference import window_starts as window_starts
    from ssl3d.encoders.masking import can_mask as can_mask
    from ssl3d.encoders.masking import only_visible as only_visible
    from ssl3d.encoders.masking import visible_at as visible_at
    from ssl3d.encoders.norms import norm as norm
    from ssl3d.errors import CheckpointError as CheckpointError
    from ssl3d.errors import DataError as DataError
    from ssl3d.errors import Ssl3dError as Ssl3dError
    from ssl3d.errors import TrainingError as TrainingError
    from ssl3d.errors import UsageError as UsageError
    from ssl3d.evaluation import statistics as statistics
    from ssl3d.evaluation.leaks import leak_flags as leak_flags
    from ssl3d.evaluation.records import Result as Result
    from ssl3d.evaluation.records import find_result as find_result
    from ssl3d.evaluation.records import read_result as read_result
    from ssl3d.evaluation.records import split_digest as split_digest
    from ssl3d.evaluation.records import write_result as write_result
    from ssl3d.heads.aggregator import AggregatedEncoder as AggregatedEncoder
    from ssl3d.heads.aggregator import AggregatorConfig as AggregatorConfig
    from ssl3d.heads.aggregator import Attended as Attended
    from ssl3d.heads.aggregator import SliceAggregator as SliceAggregator
    from ssl3d.heads.aggregator import attended_offset as attended_offset
    from ssl3d.heads.decoder import Decoder as Decoder
    from ssl3d.heads.decoder import conv3x3x3 as conv3x3x3
    from ssl3d.heads.projection import projection_head as projection_head
    from ssl3d.objectives.clustering import MemoryBank as MemoryBank
    from ssl3d.objectives.clustering import Prototypes as Prototypes
    from ssl3d.objectives.clustering import agreement as agreement
    from ssl3d.objectives.clustering import default_prototypes as default_prototypes
    from ssl3d.objectives.clustering import mutual_information as mutual_information
    from ssl3d.objectives.clustering import perplexity as perplexity
    from ssl3d.objectives.clustering import prototype_picture as prototype_picture
    from ssl3d.objectives.clustering import shard as shard
    from ssl3d.objectives.clustering import sinkhorn as sinkhorn
    from ssl3d.objectives.clustering import spherical_kmeans as spherical_kmeans
    from ssl3d.objectives.clustering import swav_loss as swav_loss
    from ssl3d.objectives.contrastive import alignment as alignment
    from ssl3d.objectives.contrastive import barlow_twins_loss as barlow_twins_loss
    from ssl3d.objectives.contrastive import nt_xent as nt_xent
    from ssl3d.objectives.contrastive import uniformity as uniformity
    from ssl3d.objectives.permutations import PermutationSet as PermutationSet
    from ssl3d.objectives.permutations import permutation_set as permutation_set
    from ssl3d.objectives.sorting import in_order as in_order
    from ssl3d.objectives.sorting import kendall_tau as kendall_tau
    from ssl3d.objectives.sorting import sorting_loss as sorting_loss
    from ssl3d.objectives.visual_words import find_alike as find_alike
    from ssl3d.objectives.visual_words import word_places as word_places
    from ssl3d.plugin_files import code_digest as code_digest
    from ssl3d.proxy import Proxy as Proxy
    from ssl3d.proxy import StepOutput as StepOutput
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
    from ssl3d.specs import encoder_from as encoder_from
    from ssl3d.specs import fitting as fitting
    from ssl3d.specs import pooled_by as pooled_by
    from ssl3d.training.device import peak_memory as peak_memory
    from ssl3d.training.loader import Batch as Batch
    from ssl3d.training.loader import Group as Group
    from ssl3d.training.loader import Loader as Loader
    from ssl3d.training.monitor import duration as duration
    from ssl3d.training.options import request_of as request_of
    from ssl3d.training.trainee import lone_values as lone_values
    from ssl3d.views.compose import ViewRng as ViewRng
    from ssl3d.views.compose import Views as Views
    from ssl3d.views.compose import augment as augment
    from ssl3d.views.compose import augment_labelled as augment_labelled
    from ssl3d.views.compose import view_margin as view_margin
    from ssl3d.views.corruptions import Corruptions as Corruptions
    from ssl3d.views.corruptions import corrupt as corrupt
    from ssl3d.views.corruptions import restoration_error as restoration_error
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

_HOME = {
    "plugins": "plugins",
    "statistics": "evaluation",
    "Benchmark": "benchmark",
    "Contestant": "benchmark",
    "Scores": "benchmark",
    "load_encoder": "checkpoint.encoders",
    "load_proxies": "checkpoint.proxies",
    "hashes_complete": "checkpoint.volumes_seen",
    "hashes_in": "checkpoint.volumes_seen",
    "Plugins": "config",
    "parse": "config",
    "print_table": "config",
    "to_3d": "convert",
    "ConvertedConfig": "convert.encoder",
    "ConvertedEncoder": "convert.encoder",
    "load_foreign": "convert.foreign",
    "network_2d": "convert.networks",
    "export_nnunet": "convert.nnunet",
    "cache_folder": "data.cache",
    "save_nifti": "data.geometry",
    "to_patient": "data.geometry",
    "identity_hash": "data.identity",
    "open_data": "data.open",
    "open_data_for": "data.open",
    "phantom": "data.phantoms",
    "phantom_store": "data.phantoms",
    "simulated_index": "data.phantoms",
    "PrepareOptions": "data.preparation.prepare",
    "around_mask": "data.scans.boxes",
    "house_split": "data.split",
    "Collection": "data.store.collection",
    "Record": "data.store.record",
    "Volume": "data.store.volume",
    "assemble": "data.store.writer",
    "write_part": "data.store.writer",
    "AnchorPlan": "detection.anchors3d",
    "fit_shapes": "detection.anchors3d",
    "plan_anchors": "detection.anchors3d",
    "nms": "detection.boxes3d",
    "weighted_clusters": "detection.boxes3d",
    "Boxed": "detection.crops2d",
    "BoxViews3d": "detection.crops3d",
    "draw_boxed3d": "detection.crops3d",
    "move_boxed3d": "detection.crops3d",
    "Detections": "detection.metrics",
    "DetectionScores": "detection.metrics",
    "Truths": "detection.metrics",
    "average_precision": "detection.metrics",
    "box_iou": "detection.metrics",
    "froc": "detection.metrics",
    "Detection2dOptions": "detection.proxy2d",
    "DetectionPass": "detection.proxy2d",
    "DetectionProxy2d": "detection.proxy2d",
    "score_boxes": "detection.proxy2d",
    "RetinaNet3d": "detection.retinanet3d",
    "RetinaNet3dConfig": "detection.retinanet3d",
    "roi_align3d": "detection.roi_align3d",
    "DetectionTargets": "detection.two_stage2d",
    "TwoStageConfig": "detection.two_stage2d",
    "TwoStageDetector2d": "detection.two_stage2d",
    "TwoStage3dConfig": "detection.two_stage3d",
    "TwoStageDetector3d": "detection.two_stage3d",
    "gather": "distributed",
    "rank": "distributed",
    "row_counts": "distributed",
    "world_size": "distributed",
    "Encoder": "encoder",
    "memory_format": "encoders",
    "to_memory_format": "encoders",
    "dense_features": "encoders.inference",
    "embed_slices": "encoders.inference",
    "embed_volume": "encoders.inference",
    "evaluating": "encoders.inference",
    "recalibrate_norm": "encoders.inference",
    "upsample": "encoders.inference",
    "window_starts": "encoders.inference",
    "can_mask": "encoders.masking",
    "only_visible": "encoders.masking",
    "visible_at": "encoders.masking",
    "norm": "encoders.norms",
    "CheckpointError": "errors",
    "DataError": "errors",
    "Ssl3dError": "errors",
    "TrainingError": "errors",
    "UsageError": "errors",
    "leak_flags": "evaluation.leaks",
    "Result": "evaluation.records",
    "find_result": "evaluation.records",
    "read_result": "evaluation.records",
    "split_digest": "evaluation.records",
    "write_result": "evaluation.records",
    "AggregatedEncoder": "heads.aggregator",
    "AggregatorConfig": "heads.aggregator",
    "Attended": "heads.aggregator",
    "SliceAggregator": "heads.aggregator",
    "attended_offset": "heads.aggregator",
    "Decoder": "heads.decoder",
    "conv3x3x3": "heads.decoder",
    "projection_head": "heads.projection",
    "MemoryBank": "objectives.clustering",
    "Prototypes": "objectives.clustering",
    "agreement": "objectives.clustering",
    "default_prototypes": "objectives.clustering",
    "mutual_information": "objectives.clustering",
    "perplexity": "objectives.clustering",
    "prototype_picture": "objectives.clustering",
    "shard": "objectives.clustering",
    "sinkhorn": "objectives.clustering",
    "spherical_kmeans": "objectives.clustering",
    "swav_loss": "objectives.clustering",
    "alignment": "objectives.contrastive",
    "barlow_twins_loss": "objectives.contrastive",
    "nt_xent": "objectives.contrastive",
    "uniformity": "objectives.contrastive",
    "PermutationSet": "objectives.permutations",
    "permutation_set": "objectives.permutations",
    "in_order": "objectives.sorting",
    "kendall_tau": "objectives.sorting",
    "sorting_loss": "objectives.sorting",
    "find_alike": "objectives.visual_words",
    "word_places": "objectives.visual_words",
    "code_digest": "plugin_files",
    "Proxy": "proxy",
    "StepOutput": "proxy",
    "BatchRng": "rng",
    "numpy_rng": "rng",
    "one_group": "rng",
    "seed_of": "rng",
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
    "encoder_from": "specs",
    "fitting": "specs",
    "pooled_by": "specs",
    "peak_memory": "training.device",
    "Batch": "training.loader",
    "Group": "training.loader",
    "Loader": "training.loader",
    "duration": "training.monitor",
    "request_of": "training.options",
    "lone_values": "training.trainee",
    "ViewRng": "views.compose",
    "Views": "views.compose",
    "augment": "views.compose",
    "augment_labelled": "views.compose",
    "view_margin": "views.compose",
    "Corruptions": "views.corruptions",
    "corrupt": "views.corruptions",
    "restoration_error": "views.corruptions",
    "draw_crop": "views.crops",
    "draw_overlapping": "views.crops",
    "draw_positions": "views.crops",
    "fit_size": "views.crops",
    "foreground_shares": "views.crops",
    "lay_flat": "views.crops",
    "neighbour_position": "views.crops",
    "read_crop": "views.crops",
    "read_slab": "views.crops",
    "slab_size": "views.crops",
    "dataset_labels": "views.labelled",
    "draw_labelled": "views.labelled",
    "mask_places": "views.labelled",
    "mask_values": "views.labelled",
    "read_labelled": "views.labelled",
    "apply_torchio": "views.outside",
    "PairViews": "views.pairs",
    "augment_pairs": "views.pairs",
    "check_depth": "views.pairs",
    "draw_pairs": "views.pairs",
    "embed_pairs": "views.pairs",
    "pair_picture": "views.pairs",
    "draw_places": "views.places",
    "RestoreViews": "views.restore",
    "draw_one": "views.restore",
    "mirror_one": "views.restore",
    "read_foreground": "views.restore",
    "restoration_picture": "views.restore",
    "centre_crop": "views.spatial",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"ssl3d.api has no {name!r}; it has {', '.join(sorted(_HOME))}")
    if name == "plugins":
        return importlib.import_module("ssl3d.plugins")
    if name == "statistics":
        return importlib.import_module("ssl3d.evaluation.statistics")
    return getattr(importlib.import_module(f"ssl3d.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(_HOME)
