__version__ = '0.1.0'

# What psaq_mm works with, as pip writes it: setup.py asks for it, importing the package checks it.
REQUIRES = {
    'torch': '>=2.6',  # torch.load is safe by default from here on
    'mmengine': '>=0.10.4,<0.11',
    'mmcv': '>=2.0.0,<2.2.0',  # mmdet 3.3 and mmsegmentation 1.2 refuse 2.2
    'mmdet': '>=3.3.0,<3.4',
    'mmsegmentation': '>=1.2.0,<1.3',
    'timm': '>=1.0.9',
    'pydantic': '>=2.7',
    'safetensors': '>=0.4',
}
