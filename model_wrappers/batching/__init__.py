"""Prefix sharing and slot refilling for any `HFLM`; imports nothing else of this package."""
