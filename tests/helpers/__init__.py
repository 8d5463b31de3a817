"""Builders and checks that several test modules share."""
