// The masks of the trellis codes of the format, which equal those of shiftadd_cli/bcq/primitives/trellis/codes.py. Tap
// t of a mask is stored bit t % kBits of the row that is t / kBits above.
#pragma once

#include <tuple>

namespace shiftadd {

template <int Bits, int Planes, unsigned... Masks>
struct TrellisEntry {
    static constexpr int kBits = Bits, kPlanes = Planes;
    static constexpr unsigned kMasks[] = {Masks...};
};

using TrellisCodes = std::tuple<TrellisEntry<1, 2, 0x22, 0x75>,                       //
                                TrellisEntry<2, 3, 0xc1, 0x34, 0x62>,                 //
                                TrellisEntry<2, 4, 0x61, 0x04, 0x59, 0x82>,           //
                                TrellisEntry<3, 4, 0x20, 0x84, 0x111, 0x4e>,          //
                                TrellisEntry<3, 5, 0x20, 0x10e, 0x88, 0x119, 0x45>,   //
                                TrellisEntry<4, 5, 0x122, 0x25, 0x261, 0x21c, 0xc4>>;

// The masks of the code with so many bits and planes, for code that learns both at run time; null if there is none.
inline const unsigned* trellis_masks(int bits, int planes) {
    const unsigned* masks = nullptr;
    std::apply(
        [&](auto... code) {
            ((code.kBits == bits && code.kPlanes == planes ? void(masks = decltype(code)::kMasks) : void()), ...);
        },
        TrellisCodes{});
    return masks;
}

}  // namespace shiftadd
