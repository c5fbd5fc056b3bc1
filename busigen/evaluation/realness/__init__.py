"""Section: real or synthetic?"""
