from .encoders import check_encoder as check_encoder
from .encoders import dead_taps as dead_taps
from .metrics import check_metric as check_metric
from .proxies import check_proxy as check_proxy
from .ranks import check_ranks as check_ranks
