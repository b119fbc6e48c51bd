#pragma once

#include "hal/verify.h"

namespace edge {

// Null unless the build names the key whose signatures the board takes: -DEDGE_PUBLIC_KEY='"<64 hex
// digits>"'.
Verifier* board_verifier();

}  // namespace edge
