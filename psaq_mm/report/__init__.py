"""What a run leaves for people to read: tables, figures, the page ``report.html``, and the figures in it."""
from .tables import WRITTEN, comparison_table, markdown, result_table, write_comparison

__all__ = ['WRITTEN', 'comparison_table', 'markdown', 'result_table', 'write_comparison']
