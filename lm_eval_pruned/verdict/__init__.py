"""One answer on a base model and a compressed one: may the second be shipped?"""
