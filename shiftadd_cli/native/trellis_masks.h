// The masks of the trellis codes of the format, which equal those of shiftadd_cli/bcq/primitives/trellis/codes.py. Tap t
// of a mask is stored bit t % kBits of the row that is t / kBits above.
#pragma once

#include <tuple>

namespace shiftadd {

template <int Bits, int Planes, unsigned... Masks>
struct TrellisEntry {
    static constexpr int kBits = Bits, kPlanes = Planes;
    static constexpr unsigned kMasks[] = {Masks...};
};

using TrellisCodes = std::tuple<TrellisEntry<1, 2, 0x3a, 0x43>,                       //
                                TrellisEntry<2, 3, 0x59, 0x16, 0xc1>,                 //
                                TrellisEntry<2, 4, 0x14, 0x89, 0xd1, 0xa6>,           //
                                TrellisEntry<3, 4, 0x181, 0x2, 0x124, 0x160>,         //
                                TrellisEntry<3, 5, 0x148, 0x24, 0x1fb, 0x12a, 0x78>>;

}  // namespace shiftadd
