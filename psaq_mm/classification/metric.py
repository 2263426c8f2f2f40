"""Top-k accuracy."""
from __future__ import annotations

from mmengine.evaluator import BaseMetric

from ..registry import METRICS


@METRICS.register_module()
class Accuracy(BaseMetric):
    """Share of images, in %, whose class is among the k highest scores.

    Args:
        topk (Sequence[int]): Each k makes one number, 'accuracy/topK'. Defaults to (1, 5).
        **kwargs: See mmengine's BaseMetric.
    """
    default_prefix = 'accuracy'

    def __init__(self, topk=(1, 5), **kwargs):
        super().__init__(**kwargs)
        self.topk = tuple(topk)

    def process(self, data_batch, data_samples):
        for sample in data_samples:
            scores = sample['pred_score']
            # Rank of the true class as argmax and topk see it: of equal scores the first class wins.
            label = sample['gt_label']
            first = (scores > scores[label]).sum() + (scores[:label] == scores[label]).sum()
            self.results.append(int(first))

    def compute_metrics(self, results):
        return {f'top{k}': 100 * sum(rank < k for rank in results) / len(results) for k in self.topk}
