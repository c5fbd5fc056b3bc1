"""Datasets at URLs: written through a local spool, read file by file. fsspec does the talking."""
