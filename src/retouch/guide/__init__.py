"""Steer a diffusion model while it samples."""
