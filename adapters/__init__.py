"""Adapters: the refiner inside third-party baselines, through their own training loops. None is published yet."""
