"""Do more experts translate better?"""
