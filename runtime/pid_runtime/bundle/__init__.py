"""The bundle on disk: its manifest, checked, its files and its engine sets."""
