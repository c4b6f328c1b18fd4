// Runs a library's functions for a process of another architecture: calls come on standard input,
// results go to standard output. emulated_arm.py is the other side.
//
// A call: its name, buffers, addresses within buffers, arguments. Every buffer lies against a page
// that may not be touched, at its end, so that a kernel which strays ends this process.

#include <dlfcn.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

namespace {

void read_all(void* target, size_t size) {
    if (size && std::fread(target, 1, size, stdin) != size) std::exit(std::feof(stdin) ? 0 : 2);
}
template <class T>
T read_one() {
    T value;
    read_all(&value, sizeof value);
    return value;
}

struct Buffer {
    uint8_t *pages, *data;
    size_t size, mapped;

    explicit Buffer(size_t bytes) : size(bytes) {
        const size_t page = sysconf(_SC_PAGESIZE), inside = (size + page - 1) / page * page;
        mapped = inside + page;
        pages = static_cast<uint8_t*>(mmap(nullptr, mapped, PROT_READ | PROT_WRITE,
                                           MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
        if (pages == MAP_FAILED || mprotect(pages + inside, page, PROT_NONE)) std::exit(3);
        data = pages + inside - size;
    }
};

// Where something lies: in a buffer, or nowhere if it is -1.
struct Place {
    int64_t buffer, offset;
};

}  // namespace

int main(int, char** arguments) {
    void* library = dlopen(arguments[1], RTLD_NOW);
    if (!library) {
        std::fprintf(stderr, "%s\n", dlerror());
        return 1;
    }
    for (;;) {
        std::string name(read_one<int64_t>(), ' ');
        read_all(name.data(), name.size());
        std::vector<Buffer> buffers;
        for (int64_t count = read_one<int64_t>(); count > 0; --count) {
            buffers.emplace_back(read_one<int64_t>());
            read_all(buffers.back().data, buffers.back().size);
        }
        const auto address = [&](Place p) {
            return p.buffer < 0 ? 0 : reinterpret_cast<int64_t>(buffers[p.buffer].data) + p.offset;
        };
        for (int64_t count = read_one<int64_t>(); count > 0; --count) {
            const Place at = read_one<Place>(), target = read_one<Place>();
            const int64_t value = address(target);
            std::memcpy(reinterpret_cast<void*>(address(at)), &value, sizeof value);
        }
        // Integers and addresses first, then floats: each kind has registers of its own, and the
        // rest of the first lies on the stack in eight bytes each.
        int64_t i[28] = {};
        float f[4] = {};
        for (int64_t n = 0, count = read_one<int64_t>(); n < count; ++n) {
            const Place place = read_one<Place>();
            i[n] = place.buffer == -2 ? place.offset : address(place);
        }
        for (int64_t n = 0, count = read_one<int64_t>(); n < count; ++n) f[n] = read_one<float>();
        void* function = dlsym(library, name.c_str());
        if (!function) return 4;
        using Any = int (*)(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                            int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                            int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                            int64_t, int64_t, int64_t, int64_t, float, float, float, float);
        const int32_t result = reinterpret_cast<Any>(function)(
            i[0], i[1], i[2], i[3], i[4], i[5], i[6], i[7], i[8], i[9], i[10], i[11], i[12], i[13],
            i[14], i[15], i[16], i[17], i[18], i[19], i[20], i[21], i[22], i[23], i[24], i[25],
            i[26], i[27], f[0], f[1], f[2], f[3]);
        std::fwrite(&result, sizeof result, 1, stdout);
        for (const Buffer& buffer : buffers) {
            std::fwrite(buffer.data, 1, buffer.size, stdout);
            munmap(buffer.pages, buffer.mapped);
        }
        std::fflush(stdout);
    }
}
