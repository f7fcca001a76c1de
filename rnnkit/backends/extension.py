def available(): return False
def reason(): return "stub"
