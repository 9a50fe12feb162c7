"""Optimizers, EMA and learning-rate schedules."""
