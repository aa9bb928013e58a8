"""Clips, splits and episodes: from files on disk to the uint8 frames of few-shot tasks."""
