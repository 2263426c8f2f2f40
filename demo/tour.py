"""A tour of psaq_mm from Python: what tools/dfq.py does, one step at a time, on the demo's ViT. About a minute.

    python demo/tour.py
"""
import random
import sys
import warnings
from pathlib import Path

warnings.simplefilter('ignore')
HERE = Path(__file__).resolve().parent


def say(text):
    print(f'\n{text}')


def main():
    import torch
    from mmengine.config import Config
    from mmengine.registry import MODELS, init_default_scope

    from psaq_mm.engine import read_checkpoint
    from psaq_mm.engine.checkpoint import load_float
    from psaq_mm.models import backbone_of, extract_features, quantize_model, similarity_taps
    from psaq_mm.quantization import Mode, calibrate, layer_errors, model_bits, quantized_layers, set_mode
    from psaq_mm.report.fidelity import fidelity
    from psaq_mm.stanza import QuantizationConfig
    from psaq_mm.synthesis import PatchSimilarityTap, objective, synthesize, valid_range

    torch.manual_seed(0)
    say('1. A config and its weights, as any OpenMMLab tool would load them.')
    cfg = Config.fromfile(HERE / 'vit_mini_objects.py')
    init_default_scope(cfg.default_scope)
    weights = read_checkpoint(str(HERE / 'vit_mini_objects.pth'))

    def model():
        built = MODELS.build(cfg.model).eval()
        load_float(built, weights)
        return quantize_model(built, stanza)

    stanza = QuantizationConfig.parse(dict(targets=['backbone', 'head'], synthesis=dict(size=(96, 96), steps=60)))
    student, teacher = model(), model()
    set_mode(teacher, Mode.FLOAT)
    teacher.requires_grad_(False)
    layers = quantized_layers(student)
    print(f'{len(layers)} layers and products are quantized, the first three: {", ".join(list(layers)[:3])}')
    print(f'{32 * sum(p.numel() for p in student.parameters()) / 8e6:.2f} MB become {model_bits(student) / 8e6:.2f} MB')

    say('2. Images from noise: the entropy of patch similarities rises.')
    preprocessor = student.data_preprocessor
    low, high = valid_range(preprocessor.mean.flatten(), preprocessor.std.flatten())
    noise = torch.randn(16, 3, 96, 96).maximum(low).minimum(high)
    tap = PatchSimilarityTap(*similarity_taps(backbone_of(teacher), noise[:1]))

    def run(images):
        tap.run(backbone_of(teacher), images)

    def entropy(images):
        return objective(images, run, tap, stanza.synthesis, random.Random(0))[1]['entropy']

    images = synthesize(noise, run, tap, stanza.synthesis, low, high, 'tour')
    print(f'entropy of the noise {entropy(noise):.2f}, of the images {entropy(images):.2f} nats a block')

    say('3. Calibration on these images chooses every scale; on noise it would choose others.')
    found = {}
    for name, batch in (('noise', noise), ('images', images)):
        candidate = student if name == 'images' else model()
        calibrate(candidate, lambda c=candidate, b=batch: extract_features(c, b, True))
        found[name] = candidate
    name = 'backbone.blocks.3.mlp.fc2'
    for kind, candidate in found.items():
        quantizer = candidate.get_submodule(name).input_quantizer
        print(f'calibrated on {kind}: one integer step of what enters {name} is {quantizer.scale.item():.4f}')

    say('4. How close is it? On fresh images that neither has seen, with full precision as the truth.')
    fresh = synthesize(torch.randn(16, 3, 96, 96), run, tap, stanza.synthesis, low, high, 'fresh')
    for kind, candidate in found.items():
        judged = fidelity(teacher, candidate, [fresh], heads=True)
        numbers = ', '.join(f'{key} {value:.3g}' for key, value in judged['predictions'].items())
        print(f'calibrated on {kind}: {numbers}, cosine of features {judged["cosine"]:.4f}')

    say('5. Where does it lose most?')
    errors = layer_errors(student, lambda: extract_features(student, fresh, True))
    for error in sorted(errors, key=lambda e: e.sqnr)[:3]:
        print(f'{error.name}: {error.sqnr:.1f} dB')

    say('The game, which distils the student on evolving images, and everything around it: tools/dfq.py '
        'demo/dfq_classification_w8a8.py')
    return 0


if __name__ == '__main__':
    sys.exit(main())
