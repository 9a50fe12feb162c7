"""Images and labels: sources, formats, the order of a run, augmentation."""
