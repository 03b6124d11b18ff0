"""Basics that every package uses: errors, messages, settings, random streams, statistics, files. No models here."""
