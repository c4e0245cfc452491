from .checkpoint.encoders import load_encoder as load_encoder
from .checkpoint.proxies import load_proxies as load_proxies
from .specs import encoder_from as encoder_from
from .training.pretrain import pretrain as pretrain
from .training.pretrain import resume as resume
