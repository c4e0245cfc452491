"""The names of `ssl3d.api`, each once, by what they are for; `ssl3d/api.py` loads them when first used."""

# Proxies and the shared encoder
# Options, plugins, errors and words
from . import plugins as plugins
from .amounts import (
    duration as duration,
)
from .amounts import (
    size as size,
)

# Benchmarks, records and statistics
from .benchmark import (
    Benchmark as Benchmark,
)
from .benchmark import (
    Contestant as Contestant,
)
from .benchmark import (
    Scores as Scores,
)
from .checkpoint.encoders import load_encoder as load_encoder
from .checkpoint.proxies import load_proxies as load_proxies
from .checkpoint.volumes_seen import (
    hashes_complete as hashes_complete,
)
from .checkpoint.volumes_seen import (
    hashes_in as hashes_in,
)
from .config import (
    Plugins as Plugins,
)
from .config import (
    parse as parse,
)
from .config import (
    print_table as print_table,
)
from .convert.encoder import (
    ConvertedConfig as ConvertedConfig,
)
from .convert.encoder import (
    ConvertedEncoder as ConvertedEncoder,
)
from .convert.networks import network_2d as network_2d

# Volumes
from .data.cache import cache_folder as cache_folder
from .data.identity import identity_hash as identity_hash
from .data.open import (
    open_data as open_data,
)
from .data.open import (
    open_data_for as open_data_for,
)
from .data.phantoms import (
    phantom as phantom,
)
from .data.phantoms import (
    phantom_store as phantom_store,
)
from .data.phantoms import (
    simulated_index as simulated_index,
)
from .data.preparation.prepare import PrepareOptions as PrepareOptions
from .data.scans.boxes import around_mask as around_mask
from .data.split import house_split as house_split
from .data.store.collection import Collection as Collection
from .data.store.record import Record as Record
from .data.store.volume import Volume as Volume
from .data.store.writer import (
    assemble as assemble,
)
from .data.store.writer import (
    write_part as write_part,
)

# Segmentation and detection
from .detection.anchors3d import (
    AnchorPlan as AnchorPlan,
)
from .detection.anchors3d import (
    fit_shapes as fit_shapes,
)
from .detection.anchors3d import (
    plan_anchors as plan_anchors,
)
from .detection.boxes3d import (
    nms as nms,
)
from .detection.boxes3d import (
    weighted_clusters as weighted_clusters,
)
from .detection.crops2d import Boxed as Boxed
from .detection.crops3d import (
    BoxViews3d as BoxViews3d,
)
from .detection.crops3d import (
    draw_boxed3d as draw_boxed3d,
)
from .detection.crops3d import (
    move_boxed3d as move_boxed3d,
)
from .detection.metrics import (
    Detections as Detections,
)
from .detection.metrics import (
    DetectionScores as DetectionScores,
)
from .detection.metrics import (
    Truths as Truths,
)
from .detection.metrics import (
    average_precision as average_precision,
)
from .detection.metrics import (
    box_iou as box_iou,
)
from .detection.metrics import (
    froc as froc,
)
from .detection.proxy2d import (
    Detection2dOptions as Detection2dOptions,
)
from .detection.proxy2d import (
    DetectionPass as DetectionPass,
)
from .detection.proxy2d import (
    DetectionProxy2d as DetectionProxy2d,
)
from .detection.proxy2d import (
    score_boxes as score_boxes,
)
from .detection.retinanet3d import (
    RetinaNet3d as RetinaNet3d,
)
from .detection.retinanet3d import (
    RetinaNet3dConfig as RetinaNet3dConfig,
)
from .detection.two_stage2d import (
    DetectionTargets as DetectionTargets,
)
from .detection.two_stage2d import (
    TwoStageConfig as TwoStageConfig,
)
from .detection.two_stage2d import (
    TwoStageDetector2d as TwoStageDetector2d,
)
from .detection.two_stage3d import (
    TwoStage3dConfig as TwoStage3dConfig,
)
from .detection.two_stage3d import (
    TwoStageDetector3d as TwoStageDetector3d,
)

# Training
from .distributed import (
    gather as gather,
)
from .distributed import (
    rank as rank,
)
from .distributed import (
    row_counts as row_counts,
)
from .distributed import (
    world_size as world_size,
)
from .encoder import Encoder as Encoder
from .encoders import (
    memory_format as memory_format,
)
from .encoders import (
    to_memory_format as to_memory_format,
)
from .encoders.copies import (
    flat_parameters as flat_parameters,
)
from .encoders.copies import (
    follow as follow,
)
from .encoders.copies import (
    momentum_teacher as momentum_teacher,
)
from .encoders.copies import (
    restore_parameters as restore_parameters,
)
from .encoders.inference import (
    embed_volume as embed_volume,
)
from .encoders.inference import (
    evaluating as evaluating,
)
from .encoders.inference import (
    recalibrate_norm as recalibrate_norm,
)
from .encoders.inference import (
    upsample as upsample,
)
from .encoders.inference import (
    window_starts as window_starts,
)
from .encoders.masking import (
    can_mask as can_mask,
)
from .encoders.masking import (
    only_visible as only_visible,
)
from .encoders.masking import (
    visible_at as visible_at,
)
from .encoders.norms import norm as norm
from .errors import (
    DataError as DataError,
)
from .errors import (
    Ssl3dError as Ssl3dError,
)
from .errors import (
    TrainingError as TrainingError,
)
from .errors import (
    UsageError as UsageError,
)
from .evaluation import statistics as statistics
from .evaluation.leaks import leak_flags as leak_flags
from .evaluation.record_archive import (
    pack_records as pack_records,
)
from .evaluation.record_archive import (
    record_bytes as record_bytes,
)
from .evaluation.record_archive import (
    record_files as record_files,
)
from .evaluation.record_archive import (
    unpacked_place as unpacked_place,
)
from .evaluation.records import (
    Result as Result,
)
from .evaluation.records import (
    find_result as find_result,
)
from .evaluation.records import (
    read_result as read_result,
)
from .evaluation.records import (
    split_digest as split_digest,
)
from .evaluation.records import (
    write_result as write_result,
)

# Heads on the encoder
from .heads.aggregator import (
    AggregatedEncoder as AggregatedEncoder,
)
from .heads.aggregator import (
    AggregatorConfig as AggregatorConfig,
)
from .heads.aggregator import (
    Attended as Attended,
)
from .heads.aggregator import (
    SliceAggregator as SliceAggregator,
)
from .heads.aggregator import (
    attended_offset as attended_offset,
)
from .heads.decoder import (
    Decoder as Decoder,
)
from .heads.decoder import (
    conv3x3x3 as conv3x3x3,
)
from .heads.projection import projection_head as projection_head

# Objectives
from .objectives.clustering import (
    IGNORED as IGNORED,
)
from .objectives.clustering import (
    MemoryBank as MemoryBank,
)
from .objectives.clustering import (
    Prototypes as Prototypes,
)
from .objectives.clustering import (
    agreement as agreement,
)
from .objectives.clustering import (
    balanced_assignments as balanced_assignments,
)
from .objectives.clustering import (
    cluster_loss as cluster_loss,
)
from .objectives.clustering import (
    default_prototypes as default_prototypes,
)
from .objectives.clustering import (
    mutual_information as mutual_information,
)
from .objectives.clustering import (
    perplexity as perplexity,
)
from .objectives.clustering import (
    prototype_picture as prototype_picture,
)
from .objectives.clustering import (
    push_pairs as push_pairs,
)
from .objectives.clustering import (
    queue_scores as queue_scores,
)
from .objectives.clustering import (
    shard as shard,
)
from .objectives.clustering import (
    sinkhorn as sinkhorn,
)
from .objectives.clustering import (
    swav_loss as swav_loss,
)
from .objectives.contrastive import (
    alignment as alignment,
)
from .objectives.contrastive import (
    barlow_twins_loss as barlow_twins_loss,
)
from .objectives.contrastive import (
    nt_xent as nt_xent,
)
from .objectives.contrastive import (
    uniformity as uniformity,
)
from .objectives.masked_slices import (
    interpolate_block as interpolate_block,
)
from .objectives.masked_slices import (
    mask_block as mask_block,
)
from .objectives.masked_slices import (
    standardise as standardise,
)
from .objectives.pair_clustering import (
    BalancedClustering as BalancedClustering,
)
from .objectives.pair_clustering import (
    KMeansClustering as KMeansClustering,
)
from .objectives.pair_clustering import (
    PairClustering as PairClustering,
)
from .objectives.permutations import (
    PermutationSet as PermutationSet,
)
from .objectives.permutations import (
    permutation_set as permutation_set,
)
from .objectives.sorting import (
    in_order as in_order,
)
from .objectives.sorting import (
    kendall_tau as kendall_tau,
)
from .objectives.sorting import (
    sorting_loss as sorting_loss,
)
from .objectives.visual_words import (
    find_alike as find_alike,
)
from .objectives.visual_words import (
    word_places as word_places,
)
from .plugin_files import code_digest as code_digest
from .proxy import (
    Proxy as Proxy,
)
from .proxy import (
    StepOutput as StepOutput,
)
from .rng import (
    BatchRng as BatchRng,
)
from .rng import (
    numpy_rng as numpy_rng,
)
from .rng import (
    one_group as one_group,
)
from .rng import (
    seed_of as seed_of,
)
from .segmentation.heads import segmentation_head as segmentation_head
from .segmentation.loss import dice_ce_loss as dice_ce_loss
from .segmentation.metrics import mask_scores as mask_scores
from .segmentation.network import (
    CoarseToFine as CoarseToFine,
)
from .segmentation.network import (
    SegmentationNetwork as SegmentationNetwork,
)
from .segmentation.network import (
    expanded as expanded,
)
from .segmentation.network import (
    find_region as find_region,
)
from .segmentation.network import (
    shrunk as shrunk,
)
from .segmentation.network import (
    shrunk_mask as shrunk_mask,
)
from .segmentation.save import save_segmentation as save_segmentation
from .segmentation.windows import predict_windows as predict_windows
from .specs import (
    encoder_from as encoder_from,
)
from .specs import (
    fitting as fitting,
)
from .specs import (
    pooled_by as pooled_by,
)
from .training.device import peak_memory as peak_memory
from .training.loader import Loader as Loader
from .training.options import request_of as request_of
from .training.trainee import lone_values as lone_values

# Crops and augmentations
from .views.compose import (
    ViewRng as ViewRng,
)
from .views.compose import (
    Views as Views,
)
from .views.compose import (
    augment as augment,
)
from .views.compose import (
    augment_labelled as augment_labelled,
)
from .views.compose import (
    view_margin as view_margin,
)
from .views.corruptions import (
    Corruptions as Corruptions,
)
from .views.corruptions import (
    corrupt as corrupt,
)
from .views.corruptions import (
    relative_error as relative_error,
)
from .views.corruptions import (
    restoration_error as restoration_error,
)
from .views.crops import (
    draw_crop as draw_crop,
)
from .views.crops import (
    draw_positions as draw_positions,
)
from .views.crops import (
    fit_size as fit_size,
)
from .views.crops import (
    foreground_shares as foreground_shares,
)
from .views.crops import (
    lay_flat as lay_flat,
)
from .views.crops import (
    read_slab as read_slab,
)
from .views.crops import (
    slab_size as slab_size,
)
from .views.labelled import (
    dataset_labels as dataset_labels,
)
from .views.labelled import (
    draw_labelled as draw_labelled,
)
from .views.labelled import (
    mask_places as mask_places,
)
from .views.labelled import (
    mask_values as mask_values,
)
from .views.labelled import (
    read_labelled as read_labelled,
)
from .views.outside import (
    apply_torchio as apply_torchio,
)
from .views.outside import (
    check_in_plane as check_in_plane,
)
from .views.pairs import (
    PairViews as PairViews,
)
from .views.pairs import (
    check_depth as check_depth,
)
from .views.pairs import (
    check_slab as check_slab,
)
from .views.pairs import (
    draw_pairs as draw_pairs,
)
from .views.pairs import (
    embed_pairs as embed_pairs,
)
from .views.pairs import (
    pair_picture as pair_picture,
)
from .views.places import draw_places as draw_places
from .views.restore import (
    RestoreViews as RestoreViews,
)
from .views.restore import (
    draw_one as draw_one,
)
from .views.restore import (
    mirror_one as mirror_one,
)
from .views.restore import (
    restoration_picture as restoration_picture,
)
from .views.spatial import centre_crop as centre_crop
from .views.stacks import draw_stack as draw_stack
