"""The embedded demo: quantizes a small Mask R-CNN + Swin without data and compares with what else one could do.

    python demo/run.py             # or make demo

Renders the validation scenes, then full precision, noise, V1, V2 and real-data calibration side by side. Pictures and
tables go to work_dirs/demo. Parts that are finished are not done again: delete that folder to start over.
"""
import argparse
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
METHODS = ('noise', 'psaq_v1', 'psaq_v2', 'real')


def draw_predictions(full_config, full_checkpoint, quantized, images, out):
    """Writes a picture: each scene with full-precision predictions above, quantized below."""
    import mmcv
    import numpy as np
    from mmdet.apis import inference_detector, init_detector
    from mmdet.registry import VISUALIZERS
    from PIL import Image

    from psaq_mm.engine.hooks import grid
    pictures = []
    for config, checkpoint in ((full_config, full_checkpoint), quantized):
        model = init_detector(config, str(checkpoint), device='cpu')
        visualizer = VISUALIZERS.build(dict(type='DetLocalVisualizer', name=f'demo_{len(pictures)}'))
        visualizer.dataset_meta = model.dataset_meta
        for path in images:
            image = mmcv.imread(str(path), channel_order='rgb')
            image = mmcv.imrescale(image, 2.0)
            result = inference_detector(model, mmcv.imread(str(path)))
            instances = result.pred_instances[result.pred_instances.scores > 0.5].cpu()
            instances.bboxes *= 2
            instances.masks = torch_resize(instances.masks, image.shape[:2])
            result.pred_instances = instances
            visualizer.add_datasample('demo', image, result, draw_gt=False, pred_score_thr=0.5)
            pictures.append(np.asarray(visualizer.get_image()))
    Image.fromarray(grid(pictures, columns=len(images))).save(out)


def torch_resize(masks, size):
    """Boolean masks (N, h, w) enlarged to (N, *size)."""
    import torch
    if not len(masks):
        return torch.zeros(0, *size, dtype=torch.bool)
    return torch.nn.functional.interpolate(masks[None].float(), size=size, mode='nearest')[0].bool()


def main():
    parser = argparse.ArgumentParser(description='The embedded demo.')
    parser.add_argument('--config', default=str(HERE / 'dfq_w8a8.py'), help='demo config')
    parser.add_argument('--methods', nargs='+', choices=METHODS, default=METHODS)
    parser.add_argument('--weight-bits', nargs='+', type=int, default=[8])
    parser.add_argument('--work-dir', default='work_dirs/demo')
    parser.add_argument('--json', metavar='FILE', help='also write the numbers to this file')
    args = parser.parse_args()
    os.environ.setdefault('CUDA_VISIBLE_DEVICES', '')  # small enough for any machine, and the same numbers on all
    sys.path.insert(0, str(HERE))
    import scenes
    from mmengine.config import Config
    from rich.console import Console

    from psaq_mm.engine import compare, comparison_rows, comparison_table, float_config, markdown, write_json
    from psaq_mm.errors import UserError
    for split in ('val', 'calib'):
        scenes.write_split(HERE / 'data', split, *scenes.SPLITS[split])
    out = Path(args.work_dir)
    cfg = Config.fromfile(args.config)
    try:
        results = compare(cfg, args.methods, [(bits, 8) for bits in args.weight_bits], out)
    except UserError as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    header, rows = comparison_rows(results['runs'], results['full_precision'])
    (out / 'table.md').write_text(markdown(header, rows))
    write_json(results, out / 'metrics.json')
    if args.json:
        write_json(results, args.json)
    best = results['runs'].get(f'W{args.weight_bits[0]}A8 psaq_v2')
    if best:
        draw_predictions(float_config(cfg), cfg.load_from, (best['test_config'], best['checkpoint']),
                         sorted((HERE / 'data' / 'val').glob('*.png'))[:4], out / 'predictions.png')
    Console().print(comparison_table(results['runs'], results['full_precision'],
                                     'Demo: Mask R-CNN + Swin, 100 rendered scenes; backbone and neck quantized'))
    print(f'table: {out}/table.md')
    if best:
        print(f"synthetic images: {Path(best['checkpoint']).parent / 'synthetic.png'}\n"
              f'predictions, full precision above, quantized below: {out}/predictions.png')
    return 0


if __name__ == '__main__':
    sys.exit(main())
