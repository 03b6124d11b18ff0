"""From scores to what people read: summary, figures, pages. Every figure is computed from the scores table."""
