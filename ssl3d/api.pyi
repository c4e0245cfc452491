"""The names of `ssl3d.api`, each once, by what they are for; `ssl3d/api.py` loads them when first used."""

# ruff: noqa: I001 (the headings keep their places)

# Proxies, encoders and plugins
from . import plugins as plugins
from .proxy import (
    Proxy as Proxy,
    EmbeddedViews as EmbeddedViews,
    StepOutput as StepOutput,
)
from .encoder import Encoder as Encoder
from .encoders import (
    memory_format as memory_format,
    to_memory_format as to_memory_format,
)
from .encoders.inference import (
    embed_volume as embed_volume,
    evaluating as evaluating,
    recalibrate_norm as recalibrate_norm,
    upsample as upsample,
    window_starts as window_starts,
)
from .encoders.masking import (
    can_mask as can_mask,
    norm_visible as norm_visible,
    only_visible as only_visible,
    visible_at as visible_at,
)
from .encoders.norms import norm as norm
from .encoders.copies import (
    flat_parameters as flat_parameters,
    follow as follow,
    momentum_teacher as momentum_teacher,
    restore_parameters as restore_parameters,
)
from .plugin_files import code_digest as code_digest
from .rng import (
    BatchRng as BatchRng,
    numpy_rng as numpy_rng,
    one_group as one_group,
    seed_of as seed_of,
)
from .on_device import (
    constant as constant,
    read_number as read_number,
    write_number as write_number,
)
from .distributed import (
    gather as gather,
    rank as rank,
    row_counts as row_counts,
    world_size as world_size,
)

# Encoders by their words and files
from .specs import (
    encoder_from as encoder_from,
    fitting as fitting,
    pooled_by as pooled_by,
)
from .checkpoint.encoders import load_encoder as load_encoder
from .checkpoint.models import (
    amend_model as amend_model,
    load_model as load_model,
    model_folders as model_folders,
    read_model_card as read_model_card,
    save_model as save_model,
)
from .checkpoint.proxies import load_proxies as load_proxies
from .checkpoint.snapshot import write_state as write_state
from .checkpoint.volumes_seen import (
    hashes_complete as hashes_complete,
    hashes_in as hashes_in,
)
from .checkpoint.weights import (
    encoder_digest as encoder_digest,
    restore_optimizer as restore_optimizer,
    tensor_bytes as tensor_bytes,
)
from .convert.config import ConvertedConfig as ConvertedConfig
from .convert.encoder import ConvertedEncoder as ConvertedEncoder
from .convert.foreign import load_foreign as load_foreign
from .convert.networks import network_2d as network_2d

# Volumes
from .data.cache import cache_folder as cache_folder
from .data.identity import identity_hash as identity_hash
from .data.open import (
    holds_scans as holds_scans,
    open_data as open_data,
    open_data_for as open_data_for,
)
from .data.geometry import save_nifti as save_nifti
from .data.phantoms import (
    phantom as phantom,
    phantom_store as phantom_store,
    simulated_index as simulated_index,
)
from .data.preparation.options import PrepareOptions as PrepareOptions
from .data.scans.boxes import around_mask as around_mask
from .data.split import house_split as house_split
from .data.store.collection import Collection as Collection
from .data.store.record import Record as Record
from .data.store.volume import Volume as Volume
from .data.store.windows import voxels_of as voxels_of
from .data.store.writer import (
    assemble as assemble,
    write_part as write_part,
)

from .data.size_notes import (
    large_batch_note as large_batch_note,
    large_crop_note as large_crop_note,
)

# Crops and augmentations
from .views.compose import (
    ViewRng as ViewRng,
    Views as Views,
    augment as augment,
    augment_labelled as augment_labelled,
    intensities as intensities,
    movements as movements,
    view_margin as view_margin,
)
from .views.corruptions import (
    Corruptions as Corruptions,
    corrupt as corrupt,
    corrupt_once as corrupt_once,
    mean_of as mean_of,
    means_of as means_of,
    relative_error as relative_error,
    restoration_error as restoration_error,
)
from .views.crops import (
    centres_ignored as centres_ignored,
    draw_crop as draw_crop,
    draw_positions as draw_positions,
    fit_size as fit_size,
    foreground_shares as foreground_shares,
    lay_flat as lay_flat,
    read_slab as read_slab,
    slab_size as slab_size,
)
from .views.labelled import (
    dataset_labels as dataset_labels,
    draw_labelled as draw_labelled,
    mask_places as mask_places,
    mask_values as mask_values,
    read_labelled as read_labelled,
)
from .views.outside import (
    apply_torchio as apply_torchio,
    check_in_plane as check_in_plane,
)
from .views.pairs import (
    PairViews as PairViews,
    check_depth as check_depth,
    check_pairs as check_pairs,
    check_slab as check_slab,
    draw_pairs as draw_pairs,
    embed_pairs as embed_pairs,
    pair_picture as pair_picture,
)
from .views.places import draw_places as draw_places
from .views.restore import (
    Restorable as Restorable,
    RestoreViews as RestoreViews,
    draw_one as draw_one,
    flip_counted as flip_counted,
    mirror_counted as mirror_counted,
    mirror_one as mirror_one,
    restoration_picture as restoration_picture,
)
from .views.slabs import (
    SlabViews as SlabViews,
    draw_slabs as draw_slabs,
    read_field as read_field,
)
from .views.spatial import (
    centre_crop as centre_crop,
    elastic as elastic,
    flip_in_turn as flip_in_turn,
)
from .views.stacks import draw_stack as draw_stack

# Objectives
from .objectives.clustering import (
    IGNORED as IGNORED,
    MemoryBank as MemoryBank,
    Prototypes as Prototypes,
    agreement as agreement,
    balanced_assignments as balanced_assignments,
    cluster_loss as cluster_loss,
    default_prototypes as default_prototypes,
    mutual_information as mutual_information,
    perplexity as perplexity,
    prototype_picture as prototype_picture,
    push_pairs as push_pairs,
    queue_scores as queue_scores,
    shard as shard,
    sinkhorn as sinkhorn,
    swav_loss as swav_loss,
)
from .objectives.contrastive import (
    alignment as alignment,
    Relations as Relations,
    barlow_twins_loss as barlow_twins_loss,
    local_contrast as local_contrast,
    nt_xent as nt_xent,
    set_contrast as set_contrast,
    uniformity as uniformity,
)
from .objectives.permutations import (
    PermutationSet as PermutationSet,
    permutation_set as permutation_set,
)
from .objectives.regions import (
    region_places as region_places,
    regions_at as regions_at,
)
from .objectives.sorting import (
    in_order as in_order,
    kendall_tau as kendall_tau,
    sorting_loss as sorting_loss,
)
from .objectives.visual_words import (
    find_alike as find_alike,
    word_places as word_places,
)
from .objectives.masked_slices import (
    interpolate_masked as interpolate_masked,
    mask_block as mask_block,
    mask_scattered as mask_scattered,
    standardise as standardise,
)
from .objectives.pair_clustering import (
    BalancedClustering as BalancedClustering,
    KMeansClustering as KMeansClustering,
    PairClustering as PairClustering,
)

# Heads on the encoder
from .heads.aggregator import (
    AggregatedEncoder as AggregatedEncoder,
    AggregatorConfig as AggregatorConfig,
    Attended as Attended,
    SliceAggregator as SliceAggregator,
    attended_offset as attended_offset,
    stage_features as stage_features,
    stage_width as stage_width,
)
from .heads.decoder import (
    Decoder as Decoder,
    conv3x3x3 as conv3x3x3,
)
from .heads.projection import projection_head as projection_head

# Segmentation
from .segmentation.decoders import (
    PretrainedDecoder as PretrainedDecoder,
    decode as decode,
    load_decoder as load_decoder,
    restoring_decoder as restoring_decoder,
    start_from as start_from,
    travelling as travelling,
)
from .segmentation.heads import segmentation_head as segmentation_head
from .segmentation.loss import dice_ce_loss as dice_ce_loss
from .segmentation.metrics import mask_scores as mask_scores
from .segmentation.network import (
    CoarseToFine as CoarseToFine,
    SegmentationNetwork as SegmentationNetwork,
    expanded as expanded,
    find_region as find_region,
    shrunk as shrunk,
    shrunk_mask as shrunk_mask,
)
from .segmentation.own_metrics import (
    class_values as class_values,
    load_metric as load_metric,
    metric_name as metric_name,
    recorded_metric as recorded_metric,
)
from .segmentation.save import save_segmentation as save_segmentation
from .segmentation.windows import (
    predict_slabs as predict_slabs,
    predict_windows as predict_windows,
)

# Detection
from .detection.anchors3d import (
    AnchorPlan as AnchorPlan,
    fit_shapes as fit_shapes,
    plan_anchors as plan_anchors,
)
from .detection.boxes3d import (
    nms as nms,
    weighted_clusters as weighted_clusters,
)
from .detection.crops2d import Boxed as Boxed
from .detection.crops3d import (
    BoxViews3d as BoxViews3d,
    draw_boxed3d as draw_boxed3d,
    move_boxed3d as move_boxed3d,
)
from .detection.files import write_boxes as write_boxes
from .detection.metrics import (
    Detections as Detections,
    DetectionScores as DetectionScores,
    Truths as Truths,
    average_precision as average_precision,
    box_iou as box_iou,
    froc as froc,
)
from .detection.proxy2d import (
    Detection2dOptions as Detection2dOptions,
    DetectionPass as DetectionPass,
    DetectionProxy2d as DetectionProxy2d,
    score_boxes as score_boxes,
)
from .detection.retinanet3d import (
    RetinaNet3d as RetinaNet3d,
    RetinaNet3dConfig as RetinaNet3dConfig,
)
from .detection.two_stage2d import (
    DetectionTargets as DetectionTargets,
    TwoStageConfig as TwoStageConfig,
    TwoStageDetector2d as TwoStageDetector2d,
)
from .detection.two_stage3d import (
    TwoStage3dConfig as TwoStage3dConfig,
    TwoStageDetector3d as TwoStageDetector3d,
)

# Training
from .training.device import (
    autocast as autocast,
    check_compiler as check_compiler,
    compile_encoders as compile_encoders,
    device_of as device_of,
    peak_memory as peak_memory,
)
from .training.loader import Loader as Loader
from .training.loggers import (
    Loggers as Loggers,
    check_loggers as check_loggers,
    missing_loggers as missing_loggers,
)
from .training.options import request_of as request_of
from .training.trainee import lone_values as lone_values

# Kept models and what they predict
from .model import (
    BoxPrediction as BoxPrediction,
    LabelPrediction as LabelPrediction,
    MaskPrediction as MaskPrediction,
    Model as Model,
    Portable as Portable,
    Prediction as Prediction,
    best_class as best_class,
)

# Benchmarks, records and statistics
from .benchmark import (
    Benchmark as Benchmark,
    Contestant as Contestant,
    Scores as Scores,
)
from .evaluation import statistics as statistics
from .evaluation.leaks import leak_flags as leak_flags
from .evaluation.record_archive import (
    pack_records as pack_records,
    record_bytes as record_bytes,
    record_files as record_files,
    unpacked_place as unpacked_place,
)
from .evaluation.records import (
    Result as Result,
    find_result as find_result,
    read_result as read_result,
    result_of as result_of,
    split_digest as split_digest,
    write_result as write_result,
)

# Pages
from .pages import charts as charts
from .pages import elements as elements
from .pages import palette as palette
from .pages.document import (
    beside as beside,
    document as document,
)

# Options, errors, files and words
from . import locks as locks
from .slurm import submit_jobs as submit_jobs
from .config import (
    former_defaults as former_defaults,
    Plugins as Plugins,
    added_option as added_option,
    parse as parse,
    print_table as print_table,
)
from .command_help import HelpSection as HelpSection
from .yaml_files import read_yaml as read_yaml
from .errors import (
    DataError as DataError,
    Ssl3dError as Ssl3dError,
    TrainingError as TrainingError,
    UsageError as UsageError,
    is_transient as is_transient,
    not_written as not_written,
)
from .json_files import parse_json as parse_json
from .files import (
    whole_file as whole_file,
    write_whole as write_whole,
)
from .amounts import (
    count_of as count_of,
    duration as duration,
    printable as printable,
    size as size,
)
