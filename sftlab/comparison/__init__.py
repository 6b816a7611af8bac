"""Which runs may be compared, and what do reports and studies say of them?"""
