"""Reports: records read, compared, and written as pages, Markdown and CSV."""
